// fastgpt._C_cuda: a module without functions. Loading it registers the CUDA implementations of the ops, see the .cu
// files.
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

extern "C" PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&definition); }
