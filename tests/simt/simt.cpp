// The scheduler of the emulator: threads, meeting points, blocks, launches.
//
// One OS thread runs everything. A CUDA thread runs until it waits at a meeting point (a barrier, a
// shuffle), makes an atomic access, or ends; then the next ready one runs. Blocks run one after the
// other, except that those of a cluster, or of a cooperative grid, are alive together.
//
// For ThreadSanitizer barriers order memory, and so do atomics beside a __threadfence, and the
// launches of a stream; shuffles do not. Fibers, meeting points and stacks are new for every block,
// so that nothing seems to order two blocks.

#include "simt.h"

#include <array>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <sstream>

#include "fiber.h"
#include "traffic.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

std::string text(uint3 v);                         // limits.cpp
void check_launch(const resops::LaunchConfig& c);  // limits.cpp

namespace {

constexpr long kMaxIdleAtomics = 1'000'000;

struct Thread;

// A meeting point of a warp, block, cluster or grid: who is there waits until all have come.
struct Meeting {
  std::vector<Thread*> waiting;
  size_t expected;
  unsigned phase = 0;
  // A fast thread may reach the next barrier before a slow one has left this one: the two barriers
  // order memory through different tags.
  char tag[2] = {};

  explicit Meeting(size_t threads) : expected(threads) { waiting.reserve(threads); }
};

struct Warp {
  Meeting meeting;
  Exchange exchange[2] = {};
  WarpTraffic traffic;

  explicit Warp(size_t threads) : meeting(threads) {}
};

struct Block {
  uint3 index;
  Meeting meeting;
  std::shared_ptr<Meeting> cluster;
  std::vector<Block*> cluster_blocks;
  std::vector<Warp> warps;
  char* shared = nullptr;
  size_t shared_bytes, running;
  char exit_tag = 0;

  Block(uint3 index, size_t threads, size_t shared_bytes)
      : index(index), meeting(threads), shared_bytes(shared_bytes), running(threads) {
    for (size_t first = 0; first < threads; first += 32)
      warps.emplace_back(std::min<size_t>(32, threads - first));
    void* memory = nullptr;
    if (shared_bytes > 0 && posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
    shared = static_cast<char*>(memory);
    poison();
  }
  ~Block() { std::free(shared); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void poison() {
    if (shared_bytes > 0) std::memset(shared, options().poison, shared_bytes);
  }
};

struct Thread {
  Fiber fiber;
  uint3 index = {};
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0;

  const char* waits_in = nullptr;  // "block_sync", "shuffle", ...; null where it can run
  Site site;

  std::vector<AsyncCopy> copies;
  std::vector<size_t> copy_groups;  // copies left in each committed group
  size_t next_copy = 0, next_group = 0, uncommitted = 0;

  bool fenced = false;  // since its last atomic
  std::array<const void*, 8> recent_atomics = {};
  size_t recent_count = 0;
};

struct Scheduler {
  const resops::LaunchConfig* config = nullptr;  // of the launch that runs
  KernelCall kernel = {};
  std::exception_ptr failure;
  Traffic traffic;
  ReadOnlyWatch read_only;

  Fiber fiber;
  Thread* running = nullptr;
  Stacks stacks;
  std::unique_ptr<Meeting> grid;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> threads;  // used again from block to block
  size_t alive = 0;
  std::vector<Thread*> ready;  // a ring: each thread is in it at most once
  size_t ready_first = 0, ready_count = 0;
  long idle_atomics = 0;
  uint64_t random = 0;
#ifdef SIMT_TSAN
  TsanFibers tsan_fibers;
#endif
  char start_tag = 0, end_tag = 0;
} scheduler;

std::vector<LaunchRecord> records;

size_t random_below(size_t bound) {  // xorshift
  scheduler.random ^= scheduler.random << 13;
  scheduler.random ^= scheduler.random >> 7;
  scheduler.random ^= scheduler.random << 17;
  return scheduler.random % bound;
}

std::string place_of(Site site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

Thread& self(Site site) {
  if (scheduler.running == nullptr) fail("called outside of a kernel", site);
  return *scheduler.running;
}

// ---- threads -----------------------------------------------------------------------------------

void make_ready(Thread* t) {
  const size_t capacity = scheduler.ready.size();
  scheduler.ready[(scheduler.ready_first + scheduler.ready_count++) % capacity] = t;
}

Thread* take_ready() {
  if (scheduler.ready_count == 0) return nullptr;
  std::vector<Thread*>& ready = scheduler.ready;
  Thread*& first = ready[scheduler.ready_first];
  if (options().seed != 0) {
    const size_t other = scheduler.ready_first + random_below(scheduler.ready_count);
    std::swap(first, ready[other % ready.size()]);
  }
  Thread* t = first;
  scheduler.ready_first = (scheduler.ready_first + 1) % ready.size();
  --scheduler.ready_count;
  return t;
}

void run(Thread& t) {
  scheduler.running = &t;
  threadIdx = t.index;
  blockIdx = t.block->index;
  switch_fiber(scheduler.fiber, t.fiber);
  scheduler.running = nullptr;
}

void release_if_complete(Meeting& meeting) {
  if (meeting.waiting.empty() || meeting.waiting.size() < meeting.expected) return;
  for (Thread* t : meeting.waiting) {
    t->waits_in = nullptr;
    make_ready(t);
    if (t->lane == 0) t->warp->traffic.count(scheduler.traffic);
  }
  meeting.waiting.clear();
  ++meeting.phase;
  scheduler.idle_atomics = 0;
}

void meet(Meeting& meeting, const char* what, Site site, bool orders_memory) {
  Thread& t = self(site);
  if (!meeting.waiting.empty()) {
    const Thread& other = *meeting.waiting.front();
    const bool same = other.site.line() == site.line() && other.site.column() == site.column() &&
                      std::strcmp(other.site.file_name(), site.file_name()) == 0 &&
                      std::strcmp(other.waits_in, what) == 0;
    if (!same)
      fail(std::string("divergent ") + what + ": thread " + text(other.index) + " of block " +
               text(other.block->index) + " waits in the " + other.waits_in + " at " +
               place_of(other.site),
           site);
  }
  char* tag = &meeting.tag[meeting.phase % 2];
  if (orders_memory) release(tag);
  t.waits_in = what;
  t.site = site;
  meeting.waiting.push_back(&t);
  release_if_complete(meeting);
  switch_fiber(t.fiber, scheduler.fiber);
  if (orders_memory) acquire(tag);
}

// A thread that has exited is not waited for, except by the grid: there CUDA has no such promise.
void leave(Thread& t) {
  for (Meeting* meeting : {&t.warp->meeting, &t.block->meeting, t.block->cluster.get()}) {
    --meeting->expected;
    release_if_complete(*meeting);
  }
  // The last thread of a block writes over the shared memory: another block of the cluster must
  // have read it before. (To ThreadSanitizer too this is a write.)
  release(&t.block->exit_tag);
  if (--t.block->running == 0 && scheduler.config->cluster > 1) {
    acquire(&t.block->exit_tag);
    t.block->poison();
  }
  --scheduler.alive;
  scheduler.idle_atomics = 0;
}

void thread_main() {
  fiber_begins(scheduler.fiber);
  Thread& t = *scheduler.running;
  acquire(&scheduler.start_tag);
  try {
    scheduler.kernel.run(scheduler.kernel.arguments);
  } catch (...) {
    scheduler.failure = std::current_exception();
  }
  release(&scheduler.end_tag);
  leave(t);
  switch_fiber(t.fiber, scheduler.fiber, true);
}

void start_thread(Thread& t, size_t slot, Block& block, unsigned linear) {
  const dim3 size = scheduler.config->block;
  t = Thread();
  t.index = {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
  t.block = &block;
  t.warp = &block.warps[linear / 32];
  t.lane = linear % 32;
  t.fiber.start(scheduler.stacks[slot], thread_main);
#ifdef SIMT_TSAN
  t.fiber.tsan = scheduler.tsan_fibers.take(scheduler.alive);
  const std::string name = "block " + text(block.index) + " thread " + text(t.index);
  __tsan_set_fiber_name(t.fiber.tsan, name.c_str());
#endif
  make_ready(&t);
}

[[noreturn]] void fail_deadlock() {
  std::map<std::string, size_t> places;
  for (const auto& t : scheduler.threads)
    if (t->waits_in != nullptr)
      ++places["of block " + text(t->block->index) + " wait in the " + t->waits_in + " at " +
               place_of(t->site)];
  std::ostringstream out;
  out << "simt: deadlock in " << scheduler.config->kernel << ": ";
  for (const auto& [place, count] : places) out << count << " threads " << place << "; ";
  out << "the others have exited";
  throw Error(out.str());
}

// ---- blocks ------------------------------------------------------------------------------------

void start_blocks(const std::vector<uint3>& indices) {
  const resops::LaunchConfig& config = *scheduler.config;
  const size_t per_block = size_t{1} * config.block.x * config.block.y * config.block.z;
  scheduler.alive = per_block * indices.size();
  Quiet quiet;
  scheduler.stacks.prepare(scheduler.alive);
  while (scheduler.threads.size() < scheduler.alive)
    scheduler.threads.push_back(std::make_unique<Thread>());
  scheduler.ready.resize(std::max(scheduler.ready.size(), scheduler.alive));
  for (uint3 index : indices)
    scheduler.blocks.push_back(std::make_unique<Block>(index, per_block, config.shared_bytes));
  for (size_t i = 0; i < indices.size(); ++i) {
    Block& block = *scheduler.blocks[i];
    const size_t first = i / config.cluster * config.cluster;
    block.cluster = i == first ? std::make_shared<Meeting>(per_block * config.cluster)
                               : scheduler.blocks[first]->cluster;
    for (size_t j = first; j < first + config.cluster; ++j)
      block.cluster_blocks.push_back(scheduler.blocks[j].get());
    for (size_t linear = 0; linear < per_block; ++linear) {
      const size_t slot = i * per_block + linear;
      start_thread(*scheduler.threads[slot], slot, block, static_cast<unsigned>(linear));
    }
  }
}

void stop_blocks() {
#ifdef SIMT_TSAN
  if (scheduler.alive > 0) scheduler.tsan_fibers.abandon(&scheduler.end_tag);
#endif
  Quiet quiet;
  for (auto& t : scheduler.threads) t->waits_in = nullptr;
  for (auto& block : scheduler.blocks)
    for (Warp& warp : block->warps) warp.traffic.count(scheduler.traffic);
  scheduler.blocks.clear();
  scheduler.ready_count = scheduler.alive = 0;
}

void run_blocks(const std::vector<uint3>& indices) {
  start_blocks(indices);
  while (scheduler.alive > 0) {
    Thread* t = take_ready();
    if (t == nullptr) fail_deadlock();
    run(*t);
    if (scheduler.failure) std::rethrow_exception(scheduler.failure);
  }
  stop_blocks();
}

// The lists of blocks that are alive together, in the order in which they will run.
std::vector<std::vector<uint3>> schedule(const resops::LaunchConfig& c) {
  std::vector<std::vector<uint3>> units;
  for (unsigned z = 0; z < c.grid.z; ++z)
    for (unsigned y = 0; y < c.grid.y; ++y)
      for (unsigned x = 0; x < c.grid.x; ++x) {
        if (units.empty() || (!c.cooperative && x % c.cluster == 0)) units.emplace_back();
        units.back().push_back({x, y, z});
      }
  if (options().seed != 0)
    for (size_t i = units.size(); i > 1; --i) std::swap(units[i - 1], units[random_below(i)]);
  return units;
}

}  // namespace

// ---- what the host calls -----------------------------------------------------------------------

void launch(const resops::LaunchConfig& config, KernelCall kernel) {
  if (scheduler.config != nullptr) throw Error("simt: a kernel runs already");
  check_launch(config);
  scheduler.config = &config;
  scheduler.kernel = kernel;
  scheduler.failure = nullptr;
  scheduler.idle_atomics = 0;
  scheduler.traffic = {};
  scheduler.read_only.clear();
  scheduler.random = options().seed * 0x9e3779b97f4a7c15 + 1;
  blockDim = config.block;
  gridDim = config.grid;
#ifdef SIMT_TSAN
  scheduler.tsan_fibers.start_launch();
  scheduler.fiber.tsan = scheduler.tsan_fibers.main();
#endif
  release(&scheduler.start_tag);
  try {
    const std::vector<std::vector<uint3>> units = schedule(config);
    if (config.cooperative) {
      Quiet quiet;
      scheduler.grid = std::make_unique<Meeting>(units[0].size() * config.block.x * config.block.y *
                                                 config.block.z);
    }
    for (const std::vector<uint3>& unit : units) run_blocks(unit);
  } catch (...) {
    scheduler.failure = std::current_exception();
    stop_blocks();
  }
  acquire(&scheduler.end_tag);
  {
    Quiet quiet;
    scheduler.grid.reset();
  }
  records.push_back({config.kernel, config.grid, config.block, scheduler.traffic});
  scheduler.config = nullptr;
  if (scheduler.failure) std::rethrow_exception(std::exchange(scheduler.failure, nullptr));
}

const std::vector<LaunchRecord>& launches() { return records; }
void reset_launches() { records.clear(); }

Traffic traffic() {
  Traffic sum;
  for (const LaunchRecord& record : records) {
    const Traffic& t = record.traffic;
    sum.load_requests += t.load_requests;
    sum.load_sectors += t.load_sectors;
    sum.load_bytes += t.load_bytes;
    sum.store_requests += t.store_requests;
    sum.store_sectors += t.store_sectors;
    sum.store_bytes += t.store_bytes;
  }
  return sum;
}

// ---- what kernels call -------------------------------------------------------------------------

void fail(const std::string& what, Site site) {
  std::string where;
  if (scheduler.running != nullptr)
    where = std::string(scheduler.config->kernel) + ", block " +
            text(scheduler.running->block->index) + ", thread " + text(scheduler.running->index) +
            ", ";
  throw Error("simt: " + where + place_of(site) + ": " + what);
}

void synchronize(Scope scope, Site site) {
  Thread& t = self(site);
  switch (scope) {
    case Scope::warp:
      return meet(t.warp->meeting, "warp_sync", site, true);
    case Scope::block:
      return meet(t.block->meeting, "block_sync", site, true);
    case Scope::cluster:
      return meet(*t.block->cluster, "cluster_sync", site, true);
    case Scope::grid:
      if (scheduler.grid == nullptr) fail("grid_sync in a launch that is not cooperative", site);
      return meet(*scheduler.grid, "grid_sync", site, true);
  }
}

// The buffer of one exchange is used again by the next but one, which no lane can reach before all
// have left this one.
const Exchange& exchange(const Words& mine, const char* what, Site site) {
  Thread& t = self(site);
  Meeting& meeting = t.warp->meeting;
  Exchange& buffer = t.warp->exchange[meeting.phase % 2];
  if (meeting.waiting.empty()) buffer.lanes = 0;
  buffer.from[t.lane] = mine;
  buffer.lanes |= 1u << t.lane;
  meet(meeting, what, site, false);
  return buffer;
}

unsigned lane() { return scheduler.running->lane; }
unsigned cluster_rank() { return blockIdx.x % scheduler.config->cluster; }
unsigned cluster_size() { return scheduler.config->cluster; }

void* shared_memory(size_t bytes, Site site) {
  const Block& block = *self(site).block;
  if (bytes > block.shared_bytes)
    fail("the kernel's shared struct has " + std::to_string(bytes) + " bytes, the launch gave " +
             std::to_string(block.shared_bytes),
         site);
  return block.shared;
}

void check_shared(const void* pointer, size_t bytes, Site site) {
  const Block& block = *self(site).block;
  const char* place = static_cast<const char*>(pointer);
  if (place < block.shared || place + bytes > block.shared + block.shared_bytes)
    fail("address outside of the block's shared memory", site);
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail("misaligned address in shared memory: an access of " + std::to_string(bytes) + " bytes",
         site);
}

void* map_shared(const void* pointer, unsigned rank, Site site) {
  const Block& block = *self(site).block;
  check_shared(pointer, 1, site);
  if (rank >= block.cluster_blocks.size())
    fail("block " + std::to_string(rank) + " of a cluster of " +
             std::to_string(block.cluster_blocks.size()),
         site);
  const Block& other = *block.cluster_blocks[rank];
  if (other.running == 0)
    fail("block " + std::to_string(rank) + " of the cluster has exited, and its memory with it",
         site);
  return other.shared + (static_cast<const char*>(pointer) - block.shared);
}

void access(Access kind, const void* pointer, size_t bytes, size_t alignment, Site site) {
  if (bytes == 0) return;
  Thread& t = self(site);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const char* name = kind == Access::load ? "load" : kind == Access::store ? "store" : "load_nc";
  const auto refuse = [&](const char* why) {
    std::ostringstream out;
    out << name << " of " << bytes << " bytes at " << pointer << ": " << why;
    fail(out.str(), site);
  };
  if (address == 0) refuse("null address");
  if (address % alignment != 0) refuse("misaligned address");
  if constexpr (kTsan) return;
  if (scheduler.read_only.conflict(kind, address, bytes))
    refuse("the same launch reads this by load_nc and writes it");
  (kind == Access::store ? scheduler.traffic.store_bytes : scheduler.traffic.load_bytes) += bytes;
  t.warp->traffic.add(kind, t.lane, address, site);
}

void queue_copy(AsyncCopy copy) {
  Quiet quiet;
  scheduler.running->copies.push_back(copy);
  ++scheduler.running->uncommitted;
}

void commit_copies() {
  Quiet quiet;
  scheduler.running->copy_groups.push_back(std::exchange(scheduler.running->uncommitted, 0));
}

const AsyncCopy* next_due_copy(size_t outstanding_groups) {
  Thread& t = *scheduler.running;
  while (t.copy_groups.size() - t.next_group > outstanding_groups) {
    if (t.copy_groups[t.next_group] > 0) {
      --t.copy_groups[t.next_group];
      return &t.copies[t.next_copy++];
    }
    ++t.next_group;
  }
  return nullptr;
}

// Relaxed, like CUDA's: an atomic orders other memory only together with a fence of the same
// thread, before it (what came earlier is published) or after it (what others published is seen).
// Others run first, so that a loop that waits for them ends.
void before_atomic(const void* pointer, size_t bytes, Site site) {
  Thread& t = self(site);
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("misaligned atomic", site);
  if (++scheduler.idle_atomics > kMaxIdleAtomics)
    fail("no thread gets further: a loop of atomics waits for what never comes", site);
  make_ready(&t);
  switch_fiber(t.fiber, scheduler.fiber);
  if (std::exchange(t.fenced, false)) release(const_cast<void*>(pointer));
}

void after_atomic(const void* pointer, bool changed) {
  Thread& t = *scheduler.running;
  if (changed) scheduler.idle_atomics = 0;
  t.recent_atomics[t.recent_count++ % t.recent_atomics.size()] = pointer;
}

void fence() {
  Thread& t = *scheduler.running;
  for (size_t i = 0; i < std::min(t.recent_count, t.recent_atomics.size()); ++i)
    acquire(const_cast<void*>(t.recent_atomics[i]));
  t.recent_count = 0;
  t.fenced = true;
}

}  // namespace simt
