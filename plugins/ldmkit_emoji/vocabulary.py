"""The model's WordPiece vocabulary: every word of the emoji's names and keywords whole, and letters to spell all others.

The words are few enough (under 3,000) to be pieces of their own, which a small text encoder learns fastest. The list is a pure
function of the names: the counts that WordPiece training would rank pieces by tie so often that its result changes by the run.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

from tokenizers import normalizers, pre_tokenizers

from ldmkit.errors import DataError
from ldmkit_emoji.captions import COLOURS, PLACES, SUBJECTS
from ldmkit_emoji.glyphs import Emoji

SIZE = 4000
"""The most pieces a vocabulary may have."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
OTHER_WORDS = (
    "an the and or of in at to with without from two three some many photo drawing image icon sign symbol emoji "
    "left right large small big little tiny huge next beside above below behind under over side near far "
    "light dark bright pale cyan violet magenta grey beige turquoise gold silver navy lime colour color coloured colored "
    "happy sad angry funny cute scene background"
)
"""Words that prompts use and names may lack."""

_normalizer = normalizers.BertNormalizer(lowercase=True)
_splitter = pre_tokenizers.BertPreTokenizer()


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks, accents stripped, as BERT's tokenizer splits them.

    >>> words("flag: São Tomé & Príncipe")
    ['flag', ':', 'sao', 'tome', '&', 'principe']
    """
    return [word for word, _ in _splitter.pre_tokenize_str(_normalizer.normalize_str(text))]


def vocabulary(emoji: Sequence[Emoji]) -> list[str]:
    """The pieces in order: special ones, single characters, letters within words, whole words.

    Raises:
        DataError: when they are more than 4,000.
    """
    texts: Iterable[str] = (text for e in emoji for text in (e.name, *e.keywords))
    templates = " ".join((*SUBJECTS, *PLACES, *COLOURS)).replace("{", " ").replace("}", " ")
    whole = {word for text in (*texts, templates, OTHER_WORDS) for word in words(text)}
    letters = string.ascii_lowercase + string.digits
    characters = sorted({*letters, *string.punctuation, *"“”\u2018\u2019\u2013—"})
    pieces = [*SPECIAL, *characters, *(f"##{letter}" for letter in letters), *sorted(whole - set(characters))]
    if len(pieces) > SIZE:
        raise DataError(f"the names and keywords need {len(pieces):,} pieces, more than the {SIZE:,} a vocabulary may have")
    return pieces
