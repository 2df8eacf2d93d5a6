// fastgpt._C_cuda: loading it registers the kernels of the .cu files.
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

extern "C" PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&definition); }
