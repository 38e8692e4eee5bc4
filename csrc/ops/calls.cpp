#include "calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"
#include "gemm.h"
#include "linear_common.h"
#include "operations.h"

namespace fastllm {
namespace {

namespace py = pybind11;

// Each takes an object of exactly the Python type that the C++ type has, and says whether it did.
bool take(PyObject* from, Tensor* to) {
  if (!THPVariable_CheckExact(from)) return false;
  *to = THPVariable_Unpack(from);
  return true;
}
bool take(PyObject* from, int64_t* to) {
  if (!PyLong_CheckExact(from)) return false;
  int overflow = 0;
  *to = PyLong_AsLongLongAndOverflow(from, &overflow);
  TORCH_CHECK_VALUE(overflow == 0, "fastllm: an integer argument must fit in 64 bits");
  return true;
}
bool take(PyObject* from, double* to) {
  if (!PyFloat_CheckExact(from)) return false;
  *to = PyFloat_AS_DOUBLE(from);
  return true;
}
bool take(PyObject* from, bool* to) {
  *to = from == Py_True;
  return PyBool_Check(from) != 0;
}
template <class T>
bool take(PyObject* from, std::optional<T>* to) {
  if (from == Py_None) return true;
  T value{};
  if (!take(from, &value)) return false;
  *to = std::move(value);
  return true;
}

template <class Function>
struct Signature;
template <class... Args>
struct Signature<Tensor(Args...)> {
  using Function = Tensor(Args...);
  using Values = std::tuple<std::decay_t<Args>...>;
};
template <class Function>
using SignatureOf = Signature<typename detail::FlatFunction<Function>::Function>;
using Signatures = std::tuple<SignatureOf<decltype(embedding)>, SignatureOf<decltype(linear_relu)>,
                              SignatureOf<decltype(relu_mlp)>, SignatureOf<decltype(mse_loss)>,
                              SignatureOf<decltype(cross_entropy)>, SignatureOf<decltype(linear_cross_entropy)>>;
constexpr const char* kNames[] = {"embedding", "linear_relu",   "relu_mlp",
                                  "mse_loss",  "cross_entropy", "linear_cross_entropy"};

// torch.ops.fastllm.<name>.default, held as long as the interpreter lives. Looked up once, ahead: the lookup runs
// Python, which may hand the interpreter to a thread that would wait for a static variable's initialisation, for ever.
PyObject* fallbacks[std::size(kNames)];

template <size_t kIndex>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  using S = std::tuple_element_t<kIndex, Signatures>;
  constexpr size_t kCount = std::tuple_size_v<typename S::Values>;
  typename S::Values values;
  const auto take_all = [&]<size_t... i>(std::index_sequence<i...>) {
    return (take(args[i], &std::get<i>(values)) && ...);
  };
  if (at::impl::torch_function_mode_enabled() || count != static_cast<Py_ssize_t>(kCount) ||
      !take_all(std::make_index_sequence<kCount>())) {
    return PyObject_Vectorcall(fallbacks[kIndex], args, static_cast<size_t>(count), nullptr);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow((std::string("fastllm::") + kNames[kIndex]).c_str(), "")
                             .typed<typename S::Function>();
  Tensor output;
  {
    const py::gil_scoped_release no_gil;
    output = std::apply([&](const auto&... value) { return op.call(value...); }, values);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

// Device types on which `auto` finds a compiled backend.
std::vector<c10::DeviceType> served;

bool is_plain(PyObject* object) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  const Tensor& tensor = THPVariable_Unpack(object);
  return tensor.layout() == at::kStrided && !tensor.is_nested();
}

// serves(tensor, *others): whether `auto` is chosen and serves plain tensors as these, with no transform at work. Of
// False the caller finds the reason.
PyObject* serves(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (backend::current() != backend::kAuto) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!is_plain(args[i])) Py_RETURN_FALSE;
  if (count == 0 || args[0] == Py_None) Py_RETURN_FALSE;
  const c10::DispatchKeySet keys = c10::impl::tls_local_dispatch_key_set().included_;
  if (keys.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      keys.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr)
    Py_RETURN_FALSE;
  const Tensor& tensor = THPVariable_Unpack(args[0]);
  if (!is_served_dtype(tensor.scalar_type())) Py_RETURN_FALSE;
  for (const c10::DeviceType device : served)
    if (tensor.device().type() == device) Py_RETURN_TRUE;
  Py_RETURN_FALSE;
  END_HANDLE_TH_ERRORS
}

// For what is written in Python over kernel operations (fastllm/operations/dense.py); plain CPU tensors.
template <class... Values, class Function>
PyObject* plain_call(PyObject* const* args, Py_ssize_t count, Function function) {
  HANDLE_TH_ERRORS
  std::tuple<Values...> values;
  const auto take_all = [&]<size_t... i>(std::index_sequence<i...>) {
    return (take(args[i], &std::get<i>(values)) && ...);
  };
  TORCH_CHECK_TYPE(count == sizeof...(Values) && take_all(std::index_sequence_for<Values...>()),
                   "fastllm: plain tensors and numbers are wanted here");
  const at::AutoDispatchBelowADInplaceOrView below;
  return std::apply(function, values);
  END_HANDLE_TH_ERRORS
}

// out = a b + plus; plus is undefined, a row (a bias), or out itself.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& plus) {
  if (out.numel() == 0) return;
  const bool adds = defined(plus) && plus->is_same(out);
  const Tensor bias = defined(plus) && !adds ? plus->contiguous() : Tensor();
  if (!adds && try_row_product(out, a, b, bias, false)) return;
  if (!adds && try_small_product(out, a, b, bias, false)) return;
  if (bias.defined()) Tensor(out).copy_(bias.expand_as(out));
  gemm_out(out, a, b, defined(plus) ? 1 : 0);
}

PyObject* multiply_into(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return plain_call<Tensor, Tensor, Tensor, std::optional<Tensor>>(
      args, count, [](const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& plus) -> PyObject* {
        const py::gil_scoped_release no_gil;
        multiply(out, a, b, plus);
        return Py_NewRef(Py_None);
      });
}

PyObject* empty(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return plain_call<Tensor, int64_t, int64_t>(args, count, [](const Tensor& like, int64_t rows, int64_t columns) {
    return THPVariable_Wrap(pool::empty({rows, columns}, like.scalar_type()));
  });
}

PyObject* row_stride(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return plain_call<Tensor, int64_t>(args, count, [](const Tensor& like, int64_t columns) {
    return PyLong_FromLongLong(fast_row_stride(columns, like.scalar_type()));
  });
}

using Fastcall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

void define(py::module_& m, const char* name, Fastcall function, const char* doc) {
  // Python keeps the definition's address: one for each function, never freed.
  auto* definition =
      new PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(definition, nullptr));
}

}  // namespace

void find_operations() {
  const py::object operations = py::module_::import("torch").attr("ops").attr("fastllm");
  for (size_t i = 0; i < std::size(kNames); ++i)
    fallbacks[i] = py::object(operations.attr(kNames[i]).attr("default")).release().ptr();
}

void define_calls(py::module_& m) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    (define(m, kNames[i], &call<i>, "The operation of torch.ops.fastllm, its arguments by position."), ...);
  }(std::make_index_sequence<std::tuple_size_v<Signatures>>());
  define(m, "serves", &serves, "serves(tensor, *others): whether the compiled operation serves plain tensors as these");
  define(m, "multiply", &multiply_into, "multiply(out, a, b, plus): out = a b + plus; plus is None, a row, or out");
  define(m, "empty", &empty, "empty(like, rows, columns): an uninitialised matrix from the pool");
  define(m, "row_stride", &row_stride, "row_stride(like, columns): items between rows that a product writes fastest");
  m.def("set_served_devices", [](const std::vector<std::string>& types) {
    served.clear();
    for (const std::string& type : types) served.push_back(c10::Device(type).type());
  });
}

}  // namespace fastllm
