// What the bindings share. A job comes as a dict of named fields; the modules in mmebm/ops check its tensors and keep them
// alive, what is checked here is that sizes fit together and that no address that is read is null.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/langevin.h"

namespace mmebm {

template <class T>
T field(const pybind11::dict& d, const char* name) {
  return pybind11::cast<T>(d[name]);
}

// The address in a field; null only where it may be absent.
template <class T>
T* address_of(const pybind11::dict& d, const char* name, bool optional = false) {
  const uintptr_t address = d.contains(name) ? pybind11::cast<uintptr_t>(d[name]) : 0;
  if (address == 0 && !optional) throw pybind11::value_error(std::string(name) + " is null");
  return reinterpret_cast<T*>(address);
}

inline void require_addresses(pybind11::handle list, size_t count, const char* name) {
  if (!PyList_Check(list.ptr()) || static_cast<size_t>(PyList_GET_SIZE(list.ptr())) != count) {
    throw pybind11::value_error(std::string(name) + " must be a list of one address per tensor");
  }
}

// Entry `i` of a list that `require_addresses` has seen; null only where there is nothing to point to.
inline void* address_at(pybind11::handle list, size_t i, const char* name, bool empty) {
  void* address = PyLong_AsVoidPtr(PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)));
  if (address == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
  if (address == nullptr && !empty) throw pybind11::value_error(std::string(name) + " holds a null address");
  return address;
}

inline Storage storage_from(int storage) {
  if (storage < 0 || storage > 2) throw pybind11::value_error("storage must be 0 (fp32), 1 (bf16) or 2 (fp16)");
  return static_cast<Storage>(storage);
}

inline void require_options(int64_t chains, uint32_t options) {
  if (chains < 0) throw pybind11::value_error("chains must not be negative");
  if (options & ~ALL_OPTIONS) throw pybind11::value_error("options has bits that no Option names");
}

inline void require_tensor(int64_t numel, uint32_t index = 0) {
  if (numel < 0 || numel > (int64_t{1} << 33)) throw pybind11::value_error("numel must be in [0, 2**33]");
  if (index >= 1u << 24) throw pybind11::value_error("index must be below 2**24");
}

}  // namespace mmebm
