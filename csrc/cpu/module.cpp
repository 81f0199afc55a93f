// The Python face of `_C`. Loading the shared object registers its kernels with torch's dispatcher (ops_*.cpp).
#include <Python.h>

#include <exception>

#include "tiers.h"

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(specdec::kernels().isa); }

PyObject* tiers(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (const char* const* tier = specdec::runnable_tiers(); *tier != nullptr; ++tier) {
    PyObject* name = PyUnicode_FromString(*tier);
    const bool failed = name == nullptr || PyList_Append(names, name) != 0;
    Py_XDECREF(name);
    if (failed) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  return names;
}

PyObject* compiler(PyObject*, PyObject*) {
#if defined(__clang__)
  return PyUnicode_FromString("clang " __clang_version__);
#else
  return PyUnicode_FromString("gcc " __VERSION__);
#endif
}

PyMethodDef methods[] = {
    {"compiler", compiler, METH_NOARGS, "What compiled this module."},
    {"isa", isa, METH_NOARGS, "The instruction set whose kernels are in use."},
    {"tiers", tiers, METH_NOARGS,
     "The instruction sets that are compiled in and that this machine runs, slowest first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of specdec_kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  try {
    specdec::kernels();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  return PyModule_Create(&definition);
}
