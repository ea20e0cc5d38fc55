// What is recorded of accesses to global memory: 32-byte sectors per warp instruction, and what was
// read through the read-only path.

#pragma once

#include <array>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt {

// The lanes of a warp run one after the other here. Accesses belong to one instruction when they
// come from the same place in the source and each lane has been there as often since the warp last
// met.
class WarpTraffic {
 public:
  void add(Access kind, unsigned lane, uintptr_t address, Site site) {
    AccessSite& place = find(kind, site);
    const unsigned count = place.executions_of_lane[lane]++;
    if (count >= place.executions.size()) place.executions.resize(count + 1);
    Execution& execution = place.executions[count];
    const uint64_t sector = address / 32;
    for (unsigned i = execution.count; i-- > 0;)
      if (execution.sector[i] == sector) return;
    execution.sector[execution.count++] = sector;
  }

  // The warp has met: adds to the total, and starts again.
  void count(Traffic& total) {
    for (AccessSite& place : sites_) {
      const bool loads = place.kind != Access::store;
      (loads ? total.load_requests : total.store_requests) += place.executions.size();
      for (const Execution& execution : place.executions)
        (loads ? total.load_sectors : total.store_sectors) += execution.count;
      place.executions.clear();
      place.executions_of_lane.fill(0);
    }
  }

 private:
  struct Execution {  // an access is aligned and at most 16 bytes wide: one sector a lane
    unsigned count = 0;
    uint64_t sector[32];
  };
  struct AccessSite {
    const char* file;
    unsigned line, column;
    Access kind;
    std::array<unsigned, 32> executions_of_lane = {};
    std::vector<Execution> executions = {};
  };

  AccessSite& find(Access kind, Site site) {
    for (AccessSite& known : sites_)
      if (known.line == site.line() && known.column == site.column() &&
          known.file == site.file_name() && known.kind == kind)
        return known;
    sites_.push_back(
        {.file = site.file_name(), .line = site.line(), .column = site.column(), .kind = kind});
    return sites_.back();
  }

  std::vector<AccessSite> sites_;
};

// Which bytes a launch has read by load_nc, and which it has written: none may be both.
class ReadOnlyWatch {
 public:
  bool conflict(Access kind, uintptr_t address, size_t bytes) {
    if (kind == Access::load) return false;
    Sector& sector = sectors_[address / 32];
    const auto touched = static_cast<uint32_t>(((uint64_t{1} << bytes) - 1) << address % 32);
    (kind == Access::store ? sector.written : sector.read_only) |= touched;
    return (sector.written & sector.read_only) != 0;
  }
  void clear() { sectors_.clear(); }

 private:
  struct Sector {
    uint32_t read_only = 0, written = 0;  // a bit for each byte
  };
  std::unordered_map<uint64_t, Sector> sectors_;
};

}  // namespace simt
