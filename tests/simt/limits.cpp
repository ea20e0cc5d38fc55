// Options, and what a launch may ask for.

#include <algorithm>
#include <cstdlib>

#include "fiber.h"
#include "simt.h"

namespace simt {
namespace {

unsigned long long from_environment(const char* name, unsigned long long otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 0);
}

}  // namespace

Options& options() {
  static Options options = [] {
    Options o;
    o.seed = from_environment("RESOPS_SIMT_SEED", o.seed);
    o.poison = static_cast<unsigned char>(from_environment("RESOPS_SIMT_POISON", o.poison));
    o.device.shared_per_block = from_environment("RESOPS_SIMT_SHARED", o.device.shared_per_block);
    o.device.shared_per_multiprocessor =
        std::max(o.device.shared_per_multiprocessor, 2 * o.device.shared_per_block);
    return o;
  }();
  return options;
}

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

void check_launch(const resops::LaunchConfig& c) {
  const resops::DeviceLimits& device = options().device;
  const auto refuse = [&](const std::string& why) {
    throw Error(std::string("resops: launch of ") + c.kernel + " failed: " + why + "; grid " +
                text({c.grid.x, c.grid.y, c.grid.z}) + ", block " +
                text({c.block.x, c.block.y, c.block.z}) + ", " + std::to_string(c.shared_bytes) +
                " bytes of shared memory, on " + device.name);
  };
  const auto threads = uint64_t{1} * c.block.x * c.block.y * c.block.z;
  const auto blocks = uint64_t{1} * c.grid.x * c.grid.y * c.grid.z;
  if (threads == 0 || blocks == 0) refuse("empty launch");
  if (threads > 1024 || c.block.z > 64) refuse("more than 1024 threads per block, or 64 in z");
  if (c.grid.x > 0x7fffffff || c.grid.y > 65535 || c.grid.z > 65535) refuse("grid too large");
  if (c.shared_bytes > device.shared_per_block)
    refuse("more shared memory than " + std::to_string(device.shared_per_block) + " bytes");
  const auto clusters = static_cast<unsigned>(device.blocks_per_cluster);
  if (c.cluster == 0 || c.cluster > clusters || c.grid.x % c.cluster != 0)
    refuse("clusters of " + std::to_string(c.cluster) + " blocks, where the device allows " +
           std::to_string(clusters) + " and grid.x must be a multiple");
  const int per_multiprocessor =
      resops::max_blocks_per_multiprocessor(static_cast<int>(threads), c.shared_bytes);
  const auto resident = static_cast<uint64_t>(device.multiprocessors * per_multiprocessor);
  const uint64_t together = c.cooperative ? blocks : c.cluster;
  if (together > resident)
    refuse(std::to_string(together) + " blocks at once, where " + std::to_string(resident) +
           " fit");
  if (together * threads > kMaxFibers) refuse("more threads at once than the emulator has");
  if (kTsan && threads > 256) refuse("more than 256 threads per block under ThreadSanitizer");
}

}  // namespace simt

int resops::max_blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  const DeviceLimits& device = simt::options().device;
  const int by_threads = device.threads_per_multiprocessor / ((threads + 31) / 32 * 32);
  const size_t by_shared = device.shared_per_multiprocessor / std::max<size_t>(shared_bytes, 1);
  return static_cast<int>(std::min<size_t>({static_cast<size_t>(by_threads), by_shared, 32}));
}
