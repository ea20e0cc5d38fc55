// The device and the stream that launchers work on. No CUDA header here.

#pragma once

namespace resops::cuda {

using Stream = void*;  // cudaStream_t

// Makes a device the one that the launchers use, for this thread: the CUDA runtime that is linked
// into this library is not torch's, and keeps its own record.
void set_device(int index);

}  // namespace resops::cuda
