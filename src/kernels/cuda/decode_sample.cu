// decode_sample: a cluster of 8 blocks holds one row in shared memory.
//
// The kept set of kernels/sampling.h is a prefix of the ids in descending order (ties: lower id first), because min-p,
// top-k and top-p each cut that order somewhere. A (logit, id) pair is one number in that order, so:
//   1. every warp's greatest, told to all blocks, gives the greatest of all and shows NaN and +inf;
//   2. the 128th of the 256 warps' greatest is a bound that at least 128 ids, and rarely many more, reach: these go to
//      the first block, which sorts them, finds the cuts and draws;
//   3. where the cut lies beyond the list (a flat distribution): the cut of top_k, then that of min_p and top_p among
//      what is kept, each by a search over the bits of the pair's order, most significant first, counting (or adding
//      the weights of) the elements above the candidate; then the greatest l + gumbel(id) of the kept. Ids that cannot
//      win, since gumbel is at most 17.4, draw no number.
// Weights and keys are double, as in the reference.
#include <cooperative_groups.h>

#include <string>

#include "base/random.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode.h"

namespace tokenspeed::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kCluster = 8;
constexpr int kValueBits = 32;
constexpr int kIdBits = 19;               // ids below 524,288
constexpr double kGreatestGumbel = 17.4;  // -log(-log(1 - 2^-25)) = 17.33
constexpr double kNoWeight = -50.0;       // e^-50 of 524,288 ids is below half a rounding of 1
constexpr int kListBound = 128;           // of the warps' greatest
constexpr int kListLimit = kThreads;
constexpr uint64_t kBadOrder = ~uint64_t{0};  // of a NaN or +inf

// Position in descending order as a number: the greater comes first.
__device__ inline uint64_t order_of(float value, int id) {
  return static_cast<uint64_t>(ordered_bits(value)) << kIdBits | static_cast<uint64_t>((1 << kIdBits) - 1 - id);
}
__device__ inline int id_of(uint64_t order) {
  return (1 << kIdBits) - 1 - static_cast<int>(order & ((uint64_t{1} << kIdBits) - 1));
}
__device__ inline float value_of(uint64_t order) {
  const auto bits = static_cast<uint32_t>(order >> kIdBits);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Ids of one block, whole vectors of four.
__host__ __device__ constexpr int slice_of(int64_t vocabulary) {
  return static_cast<int>(((vocabulary + kCluster - 1) / kCluster + 3) / 4 * 4);
}

struct Best {
  double key;
  int id;
};
__device__ inline Best better(const Best& a, const Best& b) {
  return b.key > a.key || (b.key == a.key && b.id < a.id) ? b : a;
}

struct SampleShared {
  double sum_of_warp[kWarps];
  double sum_of_block[2][kCluster];  // alternating, so that one barrier per sum is enough
  Best best_of_warp[kWarps];
  Best best_of_block[kCluster];
  uint64_t greatest_of_warp[kCluster * kWarps];  // of every block
  uint64_t bound;
  // The first block's.
  unsigned listed;
  uint64_t list[kListLimit];
  uint64_t sorted[kListLimit];
  double weights[kListLimit];
  int kept;     // of the sorted list; 0: the cut lies beyond it
  bool beyond;  // told to all blocks
};

// Sum over the cluster in a fixed order; the same value in every thread. Counts below 2^53 are exact.
__device__ double cluster_sum(cg::cluster_group& cluster, SampleShared& s, int& turn, double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  if (threadIdx.x % kWarp == 0) s.sum_of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x < kCluster) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += s.sum_of_warp[i];
    *cluster.map_shared_rank(&s.sum_of_block[turn][cluster.block_rank()], threadIdx.x) = sum;
  }
  cluster.sync();
  double sum = 0;
  for (int i = 0; i < kCluster; ++i) sum += s.sum_of_block[turn][i];
  turn ^= 1;
  return sum;
}

// The block's best, in its first kCluster threads.
__device__ Best block_best(SampleShared& s, Best best) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    best = better(best, {__shfl_xor_sync(~0u, best.key, offset), __shfl_xor_sync(~0u, best.id, offset)});
  }
  if (threadIdx.x % kWarp == 0) s.best_of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x < kCluster) {
    for (int i = 0; i < kWarps; ++i) best = better(best, s.best_of_warp[i]);
  }
  return best;
}
__device__ Best cluster_best(cg::cluster_group& cluster, SampleShared& s, Best best) {
  best = block_best(s, best);
  if (threadIdx.x < kCluster) {
    *cluster.map_shared_rank(&s.best_of_block[cluster.block_rank()], threadIdx.x) = best;
  }
  cluster.sync();
  best = s.best_of_block[0];
  for (int i = 1; i < kCluster; ++i) best = better(best, s.best_of_block[i]);
  cluster.sync();  // before anybody writes again
  return best;
}

// The order of the last element of the shortest prefix whose measure reaches `target`: the greatest `cut` such that the
// elements at or above it measure at least target. 0 when all together do not.
template <typename Measure>
__device__ uint64_t find_cut(cg::cluster_group& cluster, SampleShared& s, int& turn, double target,
                             const Measure& measure) {
  uint64_t cut = 0;
  for (int bit = kValueBits + kIdBits - 1; bit >= 0; --bit) {
    const uint64_t candidate = cut | uint64_t{1} << bit;
    if (cluster_sum(cluster, s, turn, measure(candidate)) >= target) cut = candidate;
  }
  return cut;
}

__device__ double gumbel(uint64_t seed, int64_t position, int id) {
  uint32_t counter[4] = {static_cast<uint32_t>(id), 0, static_cast<uint32_t>(position),
                         static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32)};
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, counter[0]), low0 = 0xD2511F53u * counter[0];
    const uint32_t high1 = __umulhi(0xCD9E8D57u, counter[2]), low1 = 0xCD9E8D57u * counter[2];
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return -log(-log((static_cast<double>(counter[0] >> 8) + 0.5) * 0x1p-24));
}

// A row's numbers that every step needs.
struct Row {
  DecodeSampleRow p;
  int vocabulary;
  int first;  // of this block's slice
  int count;
  double greatest;
  double temperature;
  __device__ double scaled(float value) const { return (static_cast<double>(value) - greatest) / temperature; }
  __device__ bool cuts_count() const { return p.top_k > 0 && p.top_k < vocabulary; }
  __device__ bool cuts() const { return cuts_count() || p.min_p > 0.0f || p.top_p < 1.0f; }
};

// Copies the slice to shared memory; the greatest order of what the thread copied.
__device__ uint64_t load_slice(const float* from, int first, int count, float* values) {
  constexpr int kFlight = 8;
  uint64_t greatest = 0;
  const auto take = [&](float value, int i) {
    values[i] = value;
    greatest = max(greatest, value < INFINITY ? order_of(value, first + i) : kBadOrder);
  };
  const int vectors = reinterpret_cast<uintptr_t>(from) % 16 == 0 ? count / 4 : 0;
  for (int begin = threadIdx.x; begin < vectors; begin += kFlight * kThreads) {
    float4 v[kFlight];
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      if (begin + j * kThreads < vectors) v[j] = reinterpret_cast<const float4*>(from)[begin + j * kThreads];
    }
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      const int i = 4 * (begin + j * kThreads);
      if (i >= 4 * vectors) break;
      take(v[j].x, i);
      take(v[j].y, i + 1);
      take(v[j].z, i + 2);
      take(v[j].w, i + 3);
    }
  }
  for (int i = 4 * vectors + threadIdx.x; i < count; i += kThreads) take(from[i], i);
  return greatest;
}

__device__ uint64_t warp_greatest(uint64_t value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// How many of the n sorted elements step 4 of kernels/sampling.h keeps, or 0 when that shows only further down. total:
// the weight of the whole row, read where no other cut comes before top_p.
__device__ int count_kept(const Row& row, const double* weights, int n, double total) {
  const int most = row.cuts_count() ? row.p.top_k : row.vocabulary;
  const double least = min(1.0, static_cast<double>(row.p.min_p));
  int kept = 0;
  while (kept < n && kept < most && weights[kept] >= least) ++kept;
  const bool inside = kept < n || kept == most;
  kept = max(kept, 1);
  if (row.p.top_p >= 1.0f) return inside ? kept : 0;
  if (inside) {
    total = 0;
    for (int i = 0; i < kept; ++i) total += weights[i];
  } else if (row.cuts_count() || row.p.min_p > 0.0f) {
    return 0;
  }
  double sum = 0;
  for (int i = 0; i < kept; ++i) {
    sum += weights[i];
    if (sum >= static_cast<double>(row.p.top_p) * total) return i + 1;
  }
  return inside ? kept : 0;
}

// Step 2 above; true when the token has been written.
__device__ bool sample_from_list(cg::cluster_group& cluster, SampleShared& s, int& turn, const Row& row,
                                 const float* values, int32_t* token) {
  if (threadIdx.x < kCluster * kWarps) {
    const uint64_t mine = s.greatest_of_warp[threadIdx.x];
    int above = 0;
    for (int i = 0; i < kCluster * kWarps; ++i) above += s.greatest_of_warp[i] > mine;
    if (above == kListBound - 1 && mine != 0) s.bound = mine;
  }
  __syncthreads();
  SampleShared* const first_block = cluster.map_shared_rank(&s, 0);
  double sum = 0;
  const bool needs_total = row.p.top_p < 1.0f && !row.cuts_count() && row.p.min_p <= 0.0f;
  for (int i = threadIdx.x; i < row.count; i += kThreads) {
    const uint64_t order = order_of(values[i], row.first + i);
    if (order >= s.bound) {
      const unsigned at = atomicAdd(&first_block->listed, 1u);
      if (at < kListLimit) first_block->list[at] = order;
    }
    if (!needs_total) continue;
    const double scaled = row.scaled(values[i]);
    if (scaled > kNoWeight) sum += exp(scaled);
  }
  const double total = cluster_sum(cluster, s, turn, sum);  // its barrier also completes the list
  if (cluster.block_rank() == 0) {
    const int n = static_cast<int>(s.listed);
    const int thread = threadIdx.x;
    if (n <= kListLimit) {
      if (thread < n) {
        const uint64_t mine = s.list[thread];
        int above = 0;
        for (int i = 0; i < n; ++i) above += s.list[i] > mine;
        s.sorted[above] = mine;
      }
      __syncthreads();
      if (thread < n) s.weights[thread] = exp(row.scaled(value_of(s.sorted[thread])));
      __syncthreads();
      if (thread == 0) s.kept = count_kept(row, s.weights, n, total);
    } else if (thread == 0) {
      s.kept = 0;
    }
    __syncthreads();
    Best best = {-INFINITY, 1 << kIdBits};
    if (thread < s.kept) {
      const int id = id_of(s.sorted[thread]);
      best = {row.scaled(value_of(s.sorted[thread])) + gumbel(row.p.seed, row.p.position, id), id};
    }
    best = block_best(s, best);
    if (thread == 0 && s.kept > 0) *token = best.id;
    if (thread < kCluster) cluster.map_shared_rank(&s, thread)->beyond = s.kept == 0;
  }
  cluster.sync();
  return !s.beyond;
}

// Step 3.
__device__ void sample_by_search(cg::cluster_group& cluster, SampleShared& s, int& turn, const Row& row,
                                 uint64_t greatest, const float* values, int32_t* token) {
  const auto over_kept = [&](uint64_t cut, const auto& add) {
    double sum = 0;
    for (int i = threadIdx.x; i < row.count; i += kThreads) {
      if (order_of(values[i], row.first + i) >= cut) sum += add(i);
    }
    return sum;
  };
  const auto one = [](int) { return 1.0; };
  uint64_t cut = 0;
  if (row.cuts_count()) {
    cut = find_cut(cluster, s, turn, row.p.top_k, [&](uint64_t candidate) { return over_kept(candidate, one); });
  }
  if (row.p.min_p > 0.0f) {
    // Ids above the threshold are a prefix, too: their number is where it is cut. The greatest itself is always kept.
    const auto passes = [&](int i) {
      return exp(row.scaled(values[i])) >= static_cast<double>(row.p.min_p) ? 1.0 : 0.0;
    };
    const double passing = cluster_sum(cluster, s, turn, over_kept(cut, passes));
    const uint64_t cut_min_p = passing < 1 ? greatest : find_cut(cluster, s, turn, passing, [&](uint64_t candidate) {
      return over_kept(candidate, one);
    });
    cut = max(cut, cut_min_p);
  }
  if (row.p.top_p < 1.0f) {
    const auto weight = [&](int i) { return exp(row.scaled(values[i])); };
    const double total = cluster_sum(cluster, s, turn, over_kept(cut, weight));
    const uint64_t cut_top_p = find_cut(cluster, s, turn, static_cast<double>(row.p.top_p) * total,
                                        [&](uint64_t candidate) { return over_kept(candidate, weight); });
    cut = min(greatest, max(cut, cut_top_p));
  }
  const double bound = gumbel(row.p.seed, row.p.position, id_of(greatest));  // the greatest's own key
  Best best = {-INFINITY, 1 << kIdBits};
  for (int i = threadIdx.x; i < row.count; i += kThreads) {
    const double scaled = row.scaled(values[i]);
    if (order_of(values[i], row.first + i) < cut || scaled + kGreatestGumbel < bound) continue;
    best = better(best, {scaled + gumbel(row.p.seed, row.p.position, row.first + i), row.first + i});
  }
  best = cluster_best(cluster, s, best);
  if (cluster.block_rank() == 0 && threadIdx.x == 0) *token = best.id;
}

__global__ void __launch_bounds__(kThreads, 1)
    decode_sample_kernel(const float* logits, int64_t stride, int vocabulary, const DecodeSampleRow* parameters,
                         int32_t* tokens) {
  extern __shared__ __align__(16) float values[];
  __shared__ SampleShared s;
  cg::cluster_group cluster = cg::this_cluster();
  const int at = blockIdx.x / kCluster;
  const int slice = slice_of(vocabulary);
  const int rank = static_cast<int>(cluster.block_rank());
  Row row;
  row.vocabulary = vocabulary;
  row.first = rank * slice;
  row.count = max(0, min(slice, vocabulary - row.first));
  if (threadIdx.x == 0) {
    s.listed = 0;
    s.bound = 0;
  }
  wait_for_predecessor();
  allow_successor();
  cluster.sync();  // every block runs before its shared memory is written
  row.p = parameters[at];
  int turn = 0;

  const uint64_t own = warp_greatest(load_slice(logits + at * stride + row.first, row.first, row.count, values));
  if (threadIdx.x % kWarp < kCluster) {
    cluster.map_shared_rank(&s, threadIdx.x % kWarp)->greatest_of_warp[rank * kWarps + threadIdx.x / kWarp] = own;
  }
  cluster.sync();
  uint64_t greatest = 0;
  for (int i = threadIdx.x % kWarp; i < kCluster * kWarps; i += kWarp) greatest = max(greatest, s.greatest_of_warp[i]);
  greatest = warp_greatest(greatest);
  row.greatest = static_cast<double>(value_of(greatest));
  row.temperature = static_cast<double>(row.p.temperature);
  const bool bad = greatest == kBadOrder || value_of(greatest) == -INFINITY;
  if (bad || row.p.temperature == 0.0f) {
    if (rank == 0 && threadIdx.x == 0) tokens[at] = bad ? -1 : id_of(greatest);
    return;
  }
  if (row.cuts() && sample_from_list(cluster, s, turn, row, values, tokens + at)) return;
  sample_by_search(cluster, s, turn, row, greatest, values, tokens + at);
}

}  // namespace

Status decode_sample(const DecodeSample& args, const Launch& launch) {
  const auto bad = [](const std::string& what) { return invalid_argument("decode_sample: " + what); };
  if (args.rows < 1 || args.rows > kDecodeTokens)
    return bad("rows is " + std::to_string(args.rows) + ", 1 to 8 are taken");
  if (args.vocabulary < 1 || args.vocabulary > 400000) {
    return bad("a vocabulary of " + std::to_string(args.vocabulary) + " does not fit; the limit is 400000");
  }
  const size_t shared = static_cast<size_t>(slice_of(args.vocabulary)) * sizeof(float);
  return launch_kernel("decode_sample", launch, decode_sample_kernel, dim3(static_cast<unsigned>(args.rows * kCluster)),
                       kThreads, shared, kCluster, args.logits, args.stride, static_cast<int>(args.vocabulary),
                       args.parameters, args.tokens);
}

}  // namespace tokenspeed::kernels::cuda
