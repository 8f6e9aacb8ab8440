// The module ldmkit._C (or, emulated, another of the same functions): how it was built, and what every op's binding adds.
#include "binding.h"

#include <torch/version.h>

#include "instruction_set.h"

namespace ldmkit {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu"] = name_of(instruction_set());
#ifdef WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace ldmkit

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "ldmkit's compiled kernels; use them through ldmkit.kernels.";
  module.def("build_info", &ldmkit::build_info);
  for (const auto& bind : ldmkit::Binding::all()) bind(module);
}
