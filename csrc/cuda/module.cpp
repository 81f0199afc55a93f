// The Python face of `_C_cuda`. Loading the shared object registers its kernels with torch's dispatcher (the .cu
// files).
#include <Python.h>

namespace {

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C_cuda",
                          "CUDA kernels of specdec_kernels.",
                          -1,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&definition); }
