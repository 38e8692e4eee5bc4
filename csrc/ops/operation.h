// How an operation's C++ functions meet its declaration in fastllm/operations: a call of a kernel operation through the
// dispatcher with the C++ function's own signature, and the registration of a public operation and of CPU kernels.
//
// Schemas, fake kernels, autocast rules and FLOPs stand in Python; csrc/ops/declared.cpp completes the registration.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fastllm {

// The options of a loss over rows: one argument in C++, five in a schema.
struct LossOptions {
  int64_t reduction = 1, ignore_index = -100;
  double label_smoothing = 0, lse_square_scale = 0;
  std::optional<double> softcap;
};

// An argument of a C++ function as the arguments of a schema.
template <class T>
struct Flat {
  using Types = std::tuple<T>;
  static Types split(T value) { return Types(std::forward<T>(value)); }
};
template <>
struct Flat<const LossOptions&> {
  using Types = std::tuple<int64_t, int64_t, double, double, std::optional<double>>;
  static Types split(const LossOptions& o) {
    return {o.reduction, o.ignore_index, o.label_smoothing, o.lse_square_scale, o.softcap};
  }
};

namespace detail {

template <class T>
T take(std::type_identity<T>, auto& flat, auto first) {
  return std::forward<T>(std::get<first>(flat));
}
inline LossOptions take(std::type_identity<const LossOptions&>, auto& flat, auto first) {
  return {std::get<first>(flat), std::get<first + 1>(flat), std::get<first + 2>(flat), std::get<first + 3>(flat),
          std::get<first + 4>(flat)};
}

template <class Function, class Arguments>
struct Flattened;
template <class R, class... Args, class... F>
struct Flattened<R(Args...), std::tuple<F...>> {
  using Function = R(F...);

  // The first schema argument of the i-th C++ argument.
  static constexpr auto starts() {
    std::array<size_t, sizeof...(Args) + 1> found{};
    size_t i = 0;
    ((found[i + 1] = found[i] + std::tuple_size_v<typename Flat<Args>::Types>, ++i), ...);
    return found;
  }
  template <auto* function>
  static R call(F... flat) {
    auto values = std::forward_as_tuple(std::forward<F>(flat)...);
    return [&]<size_t... i>(std::index_sequence<i...>) -> R {
      constexpr auto first = starts();
      return function(take(std::type_identity<Args>{}, values, std::integral_constant<size_t, first[i]>{})...);
    }(std::index_sequence_for<Args...>{});
  }
};
template <class F>
struct FlatFunction;
template <class R, class... Args>
struct FlatFunction<R(Args...)>
    : Flattened<R(Args...), decltype(std::tuple_cat(std::declval<typename Flat<Args>::Types>()...))> {};

}  // namespace detail

// `function` with the arguments of its schema.
template <auto* function>
constexpr auto* flat = &detail::FlatFunction<std::remove_pointer_t<decltype(function)>>::template call<function>;

// A string as a template's argument.
template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&literal)[N]) { std::copy_n(literal, N, text); }  // NOLINT: a literal is meant
};

// A call of an operation through the dispatcher, with the signature of the C++ function that implements it.
template <Name kName, class Function>
struct Dispatched;
template <Name kName, class R, class... Args>
struct Dispatched<kName, R(Args...)> {
  R operator()(Args... args) const {
    using Signature = typename detail::FlatFunction<R(Args...)>::Function;
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kName.text, "").template typed<Signature>();
    return std::apply([&](auto&&... flat) { return op.call(std::forward<decltype(flat)>(flat)...); },
                      std::tuple_cat(Flat<Args>::split(std::forward<Args>(args))...));
  }
};

}  // namespace fastllm
