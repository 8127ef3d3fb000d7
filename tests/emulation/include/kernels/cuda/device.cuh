// kernels/cuda/device.cuh as it is, behind the device language for a C++ compiler.
#pragma once

#include "emulation/device_language.h"
#include_next "kernels/cuda/device.cuh"
