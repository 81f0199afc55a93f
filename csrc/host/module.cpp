// `_host`: structures that live on the host and keep state between calls. No torch, no numpy.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ngram.h"

namespace py = pybind11;

namespace {

// What comes back: owns its numbers and shows them through the buffer protocol, so that torch and numpy need no copy.
struct Int32s {
  std::vector<int32_t> values;
};

// The lock makes an index safe to share while calls run without the interpreter's lock.
struct LockedIndex {
  specdec::SuffixIndex index;
  std::mutex mutex;
};

template <typename Call>
auto unlocked(LockedIndex& self, Call call) {
  py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(self.mutex);
  return call(self.index);
}

// numpy and array say "i" or "l", ctypes says "<i".
bool is_int32(const py::buffer_info& info) {
  const std::string& format = info.format;
  const bool integer = !format.empty() && (format.back() == 'i' || format.back() == 'l');
  return integer && format.front() != '>' && format.front() != '!' && info.itemsize == sizeof(int32_t);
}

void extend(LockedIndex& self, const py::buffer& tokens) {
  const py::buffer_info info = tokens.request();
  if (info.ndim != 1 || !is_int32(info) || (info.size > 1 && info.strides[0] != info.itemsize)) {
    throw py::value_error("tokens: expected a contiguous buffer of int32, got format '" + info.format + "' with " +
                          std::to_string(info.ndim) + " dimensions");
  }
  unlocked(self, [&](specdec::SuffixIndex& index) {
    index.extend(static_cast<const int32_t*>(info.ptr), static_cast<int64_t>(info.size));
  });
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host structures of specdec_kernels; use them through specdec_kernels.host, which checks arguments.";

  py::class_<Int32s>(m, "Int32s", py::buffer_protocol())
      .def("__len__", [](const Int32s& self) { return self.values.size(); })
      .def_buffer([](Int32s& self) {
        return py::buffer_info(self.values.data(), static_cast<py::ssize_t>(self.values.size()));
      });

  py::class_<LockedIndex>(m, "SuffixIndex")
      .def(py::init<>())
      .def("extend", &extend, py::arg("tokens"))
      .def("__len__", [](LockedIndex& self) { return unlocked(self, [](const auto& index) { return index.size(); }); })
      .def("nbytes", [](LockedIndex& self) { return unlocked(self, [](const auto& index) { return index.bytes(); }); })
      .def("longest_match",
           [](LockedIndex& self) {
             const specdec::Match match = unlocked(self, [](const auto& index) { return index.longest_match(); });
             return std::pair(match.length, match.next);
           })
      .def(
          "propose_chain",
          [](LockedIndex& self, int64_t k, int32_t min_match, int64_t max_occurrences) {
            return Int32s{
                unlocked(self, [&](const auto& index) { return index.propose_chain(k, min_match, max_occurrences); })};
          },
          py::arg("k"), py::arg("min_match"), py::arg("max_occurrences"))
      .def(
          "propose_tree",
          [](LockedIndex& self, int64_t max_nodes, int64_t branches, int64_t max_depth, int32_t min_match,
             int64_t max_occurrences) {
            specdec::Trie trie = unlocked(self, [&](const auto& index) {
              return index.propose_tree(max_nodes, branches, max_depth, min_match, max_occurrences);
            });
            return std::tuple(Int32s{std::move(trie.tokens)}, Int32s{std::move(trie.parents)},
                              Int32s{std::move(trie.frequencies)});
          },
          py::arg("max_nodes"), py::arg("branches"), py::arg("max_depth"), py::arg("min_match"),
          py::arg("max_occurrences"));
}
