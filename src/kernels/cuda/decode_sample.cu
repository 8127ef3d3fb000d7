// decode_sample: a cluster of 8 blocks holds one row in shared memory.
//
// The kept set of kernels/sampling.h is a prefix of the ids in descending order (ties: lower id first), because min-p,
// top-k and top-p each cut that order somewhere. So the cut is one (logit, id) pair, found without a sort:
//   1. greatest logit and a check of all values;
//   2. the cut of top_k, then that of top_p among what is kept, each by a search over the bits of the pair's order,
//   most
//      significant first, counting (or adding the weights of) the elements above the candidate;
//   3. the greatest l + gumbel(id) of the kept: ids that cannot win, since gumbel is at most 17.4, draw no number.
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

// Position in descending order as a number: the greater comes first.
__device__ inline uint64_t order_of(float value, int id) {
  return static_cast<uint64_t>(ordered_bits(value)) << kIdBits | static_cast<uint64_t>((1 << kIdBits) - 1 - id);
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

__device__ Best cluster_best(cg::cluster_group& cluster, SampleShared& s, Best best) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    best = better(best, {__shfl_xor_sync(~0u, best.key, offset), __shfl_xor_sync(~0u, best.id, offset)});
  }
  if (threadIdx.x % kWarp == 0) s.best_of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x < kCluster) {
    Best of_block = s.best_of_warp[0];
    for (int i = 1; i < kWarps; ++i) of_block = better(of_block, s.best_of_warp[i]);
    *cluster.map_shared_rank(&s.best_of_block[cluster.block_rank()], threadIdx.x) = of_block;
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

__global__ void __launch_bounds__(kThreads, 1)
    decode_sample_kernel(const float* logits, int64_t stride, int vocabulary, const DecodeSampleRow* parameters,
                         int32_t* tokens) {
  extern __shared__ __align__(16) float values[];
  __shared__ SampleShared s;
  cg::cluster_group cluster = cg::this_cluster();
  const int row = blockIdx.x / kCluster;
  const int slice = (vocabulary + kCluster - 1) / kCluster;
  const int first = static_cast<int>(cluster.block_rank()) * slice;
  const int count = max(0, min(slice, vocabulary - first));
  wait_for_predecessor();
  allow_successor();
  cluster.sync();  // every block runs before its shared memory is written
  const DecodeSampleRow p = parameters[row];
  int turn = 0;

  Best greatest = {-INFINITY, 1 << kIdBits};
  double bad = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float value = logits[row * stride + first + i];
    values[i] = value;
    bad += !(value < INFINITY);
    greatest = better(greatest, {static_cast<double>(value), first + i});
  }
  greatest = cluster_best(cluster, s, greatest);
  bad = cluster_sum(cluster, s, turn, bad);
  const bool writes = cluster.block_rank() == 0 && threadIdx.x == 0;
  if (bad != 0 || greatest.key == -INFINITY) {
    if (writes) tokens[row] = -1;
    return;
  }
  if (p.temperature == 0.0f) {
    if (writes) tokens[row] = greatest.id;
    return;
  }
  const double temperature = static_cast<double>(p.temperature);
  const auto scaled = [&](int i) { return (static_cast<double>(values[i]) - greatest.key) / temperature; };
  const auto over_kept = [&](uint64_t cut, const auto& add) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (order_of(values[i], first + i) >= cut) sum += add(i);
    }
    return sum;
  };
  const auto passes_min_p = [&](int i) { return p.min_p <= 0.0f || exp(scaled(i)) >= static_cast<double>(p.min_p); };
  // The greatest itself is always kept.
  const uint64_t top = order_of(static_cast<float>(greatest.key), greatest.id);
  uint64_t cut = 0;
  if (p.top_k > 0 && p.top_k < vocabulary) {
    cut = find_cut(cluster, s, turn, p.top_k,
                   [&](uint64_t candidate) { return over_kept(candidate, [](int) { return 1.0; }); });
  }
  if (p.min_p > 0.0f) {
    // Ids above the threshold are a prefix, too: their number is where it is cut.
    const double passing =
        cluster_sum(cluster, s, turn, over_kept(cut, [&](int i) { return passes_min_p(i) ? 1.0 : 0.0; }));
    const uint64_t cut_min_p = passing < 1 ? top : find_cut(cluster, s, turn, passing, [&](uint64_t candidate) {
      return over_kept(candidate, [](int) { return 1.0; });
    });
    cut = max(cut, cut_min_p);
  }
  if (p.top_p < 1.0f) {
    const auto weight = [&](int i) { return exp(scaled(i)); };
    const double total = cluster_sum(cluster, s, turn, over_kept(cut, weight));
    const uint64_t cut_top_p = find_cut(cluster, s, turn, static_cast<double>(p.top_p) * total,
                                        [&](uint64_t candidate) { return over_kept(candidate, weight); });
    cut = min(top, max(cut, cut_top_p));
  }
  const double bound = gumbel(p.seed, p.position, greatest.id);  // the greatest's own key
  Best best = {-INFINITY, 1 << kIdBits};
  for (int i = threadIdx.x; i < count; i += kThreads) {
    if (order_of(values[i], first + i) < cut || scaled(i) + kGreatestGumbel < bound) continue;
    best = better(best, {scaled(i) + gumbel(p.seed, p.position, first + i), first + i});
  }
  best = cluster_best(cluster, s, best);
  if (writes) tokens[row] = best.id;
}

}  // namespace

Status decode_sample(const DecodeSample& args, const Launch& launch) {
  const auto bad = [](const std::string& what) { return invalid_argument("decode_sample: " + what); };
  if (args.rows < 1 || args.rows > kDecodeTokens)
    return bad("rows is " + std::to_string(args.rows) + ", 1 to 8 are taken");
  if (args.vocabulary < 1 || args.vocabulary > 400000) {
    return bad("a vocabulary of " + std::to_string(args.vocabulary) + " does not fit; the limit is 400000");
  }
  const size_t shared = static_cast<size_t>((args.vocabulary + kCluster - 1) / kCluster) * sizeof(float);
  return launch_kernel("decode_sample", launch, decode_sample_kernel, dim3(static_cast<unsigned>(args.rows * kCluster)),
                       kThreads, shared, kCluster, args.logits, args.stride, static_cast<int>(args.vocabulary),
                       args.parameters, args.tokens);
}

}  // namespace tokenspeed::kernels::cuda
