// What the emulator's libraries show of themselves.

#pragma once

/// Everything else is hidden, as programs tell chips apart by which functions are there.
#define EDGEVL_EXPORT __attribute__((visibility("default")))
