// What the machine can do, to compare a model's speed with.

#pragma once

#include <cstddef>

#include "kernels/kernels.h"
#include "model/buffer.h"
#include "threads/team.h"

namespace edgevl {

/// Gigabytes a second (1e9) at which the team reads memory once, each member a part of its own.
double read_bandwidth(Team& team, const Kernels& kernels, const Buffer<std::uint8_t>& memory);

/// Giga-operations a second of int8 multiply-adds on registers, two operations each.
double int8_rate(Team& team, const Kernels& kernels);

}  // namespace edgevl
