// What the machine can do, to compare a model's speed with.

#pragma once

#include <cstddef>

#include "kernels/kernels.h"
#include "model/buffer.h"
#include "threads/thread_pool.h"

namespace edgevl {

/// Gigabytes a second (1e9) at which the thread pool reads memory once, each worker a part of its
/// own.
double read_bandwidth(ThreadPool& pool, const Kernels& kernels, const Buffer<std::uint8_t>& memory);

/// Giga-operations a second of int8 multiply-adds on registers, two operations each.
double int8_rate(ThreadPool& pool, const Kernels& kernels);

}  // namespace edgevl
