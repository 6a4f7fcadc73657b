// m2mkd._C: facts about the build. Tensors never pass through here; they go to torch's dispatcher.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "build_facts.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about how the m2mkd kernels were built.";
  module.def(
      "build_info",
      [] {
        std::map<std::string, std::string> facts;
        for (const auto& fact : kBuildFacts) {
          facts[fact[0]] = fact[1];
        }
        return facts;
      },
      "Compiler, flags, CUDA version and architectures, and the torch versions built for.");
}
