// What the launchers of csrc/cuda share with their callers: the stream, the status. Plain C++, no CUDA header.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../cpu/types.h"

struct CUstream_st;

namespace fastllm::cuda {

using Stream = CUstream_st*;  // cudaStream_t
using Status = int;           // cudaError_t; 0 is success

// CUDA's name and text of a status.
const char* status_text(Status status);

}  // namespace fastllm::cuda
