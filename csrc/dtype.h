// The dtypes that kernels serve, and their storage where no compiler type exists. Free of torch and of CUDA.
#pragma once

namespace ldmkit {

enum class Dtype : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

}  // namespace ldmkit
