// fastgpt._C: registers the CPU implementations of the ops that Python has defined, and lets Python ask and choose
// which instructions they use.
//
// It uses libtorch's stable ABI only, so that one build works with every torch from 2.11 on.
#include <Python.h>

#include "activation.h"
#include "adamw.h"
#include "attention.h"
#include "cross_entropy.h"
#include "decode.h"
#include "embedding.h"
#include "layer_norm.h"
#include "linear.h"
#include "matmul.h"
#include "orthogonal.h"

namespace fastgpt {

static Tensor large_buffer(const Tensor& like, int64_t rows, int64_t columns) {
  return new_buffer(like, {rows, columns}, /*zeros=*/false);
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_native", TORCH_BOX(&fastgpt::attention));
  m.impl("attention_native_backward", TORCH_BOX(&fastgpt::attention_backward));
  m.impl("attention_packed_native", TORCH_BOX(&fastgpt::attention_packed));
  m.impl("attention_packed_native_backward", TORCH_BOX(&fastgpt::attention_packed_backward));
  m.impl("embedding_native", TORCH_BOX(&fastgpt::embedding));
  m.impl("embedding_native_backward", TORCH_BOX(&fastgpt::embedding_backward));
  m.impl("cross_entropy_native", TORCH_BOX(&fastgpt::cross_entropy));
  m.impl("cross_entropy_native_backward", TORCH_BOX(&fastgpt::cross_entropy_backward));
  m.impl("large_buffer", TORCH_BOX(&fastgpt::large_buffer));
  m.impl("cross_entropy_chunk_", TORCH_BOX(&fastgpt::cross_entropy_chunk));
  m.impl("layer_norm_native", TORCH_BOX(&fastgpt::layer_norm));
  m.impl("layer_norm_native_backward", TORCH_BOX(&fastgpt::layer_norm_backward));
  m.impl("activation_native", TORCH_BOX(&fastgpt::activation));
  m.impl("activation_native_backward", TORCH_BOX(&fastgpt::activation_backward));
  m.impl("linear_native", TORCH_BOX(&fastgpt::linear));
  m.impl("linear_native_backward", TORCH_BOX(&fastgpt::linear_backward));
  m.impl("decode_native_", TORCH_BOX(&fastgpt::decode));
  m.impl("matmul_", TORCH_BOX(&fastgpt::matmul));
  m.impl("adamw_", TORCH_BOX(&fastgpt::adamw));
  m.impl("total_norm", TORCH_BOX(&fastgpt::total_norm));
  m.impl("orthogonal_native", TORCH_BOX(&fastgpt::orthogonal));
}

static PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(fastgpt::kernels().name); }

static PyObject* use_instruction_set(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  const bool found = fastgpt::use_kernels(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(found);
}

static PyObject* stream_threshold(PyObject*, PyObject*) { return PyLong_FromLongLong(fastgpt::stream_threshold()); }

static PyObject* set_stream_threshold(PyObject*, PyObject* bytes) {
  const long long value = PyLong_AsLongLong(bytes);
  if (value == -1 && PyErr_Occurred()) return nullptr;
  fastgpt::set_stream_threshold(value);
  Py_RETURN_NONE;
}

static PyObject* cpu_maker(PyObject*, PyObject*) { return PyUnicode_FromString(fastgpt::cpu_maker()); }

static PyMethodDef methods[] = {
    {"cpu_maker", cpu_maker, METH_NOARGS, "The maker of the processor: 'amd', 'intel' or 'other'."},
    {"stream_threshold", stream_threshold, METH_NOARGS, "Results of more bytes than this are written past the caches."},
    {"set_stream_threshold", set_stream_threshold, METH_O, "Set that number of bytes, for tests and comparisons."},
    {"instruction_set", instruction_set, METH_NOARGS, "Which vector instructions the kernels use."},
    {"use_instruction_set", use_instruction_set, METH_O,
     "Use the kernels for 'avx512', 'avx2' or 'generic', for tests and comparisons. False where they do not run here."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

extern "C" PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
