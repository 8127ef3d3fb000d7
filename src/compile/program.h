// The Program: what one rank executes for one shape class. A fixed list of operations over values with fixed places in
// one arena, the weights they need with their slices of the checkpoint, and the layout of state slots and KV pages.
//
// Every rank runs the same list (SPMD); only `WeightPiece`s differ between ranks. Programs compiled from one model for
// several shape classes name the same weights alike, so a runner loads each once.
// Invariant: all indices are valid, offsets are multiples of 64 bytes and inside the arena, and two values that are
// alive together do not overlap (unless one is a view of the other).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"
#include "compile/graph.h"
#include "compile/passes/pass.h"

namespace tokenspeed::compile {

inline constexpr int64_t kArenaAlignment = 64;
inline constexpr int64_t kFp8Block = 128;  // rows and columns that share one scale

struct ProgramValue {
  std::string name;
  RowSymbol rows = RowSymbol::kTokens;
  DType dtype = DType::kFloat32;
  int64_t columns = 0;   // of this rank
  int64_t stride = 0;    // elements from row to row: the columns of the value whose memory it lies in
  int64_t offset = 0;    // bytes from the arena's begin to its element (0, 0)
  int32_t root = kNone;  // value whose memory it lies in (itself when it is no view)
};

// Rows and columns of a canonical tensor of tensor_rows x tensor_columns (a vector has one column).
struct WeightPiece {
  std::string tensor;  // '*' stands for the expert's index
  int64_t tensor_rows = 0;
  int64_t tensor_columns = 0;
  int64_t row_begin = 0;
  int64_t rows = 0;
  int64_t column_begin = 0;
  int64_t columns = 0;
};

struct ProgramWeight {
  std::string name;
  WeightForm form = WeightForm::kMatrix;
  std::vector<WeightPiece> pieces;  // concatenated by rows
  int64_t rows = 0;                 // of one matrix on this rank
  int64_t columns = 0;
  int64_t count = 1;              // matrices one after the other (experts)
  DType dtype = DType::kFloat32;  // wanted; a runner may hold a narrower one that is exact
  int64_t bytes() const;          // in that dtype, without padding, FP8 block scales included
};

struct Operation {
  OpKind kind = OpKind::kAdd;
  std::string name;
  int32_t layer = kNone;
  int32_t stream = 0;
  std::vector<int32_t> inputs;  // values, kNone never
  std::vector<int32_t> outputs;
  std::vector<int32_t> weights;
  Attributes attributes;
};

// Byte layout of one state slot: per GDN layer the float32 recurrent state, then the conv tail.
struct StateLayout {
  struct Layer {
    StateShape shape = {};
    int64_t recurrent_offset = 0;
    int64_t conv_offset = 0;
  };
  std::vector<Layer> layers;
  DType conv_dtype = DType::kFloat32;
  int64_t bytes_per_slot = 0;
};

// Keys and values of one layer: [pages][page_size][heads][head_dim] each.
struct KvLayout {
  std::vector<KvShape> layers;
  DType dtype = DType::kBFloat16;
  int64_t bytes_per_position(int32_t layer) const;  // keys and values
  int64_t bytes_per_position() const;               // all layers
};

struct Program {
  std::string name;
  Mesh mesh;
  int32_t rank = 0;
  DType activation = DType::kFloat32;
  int64_t tokens = 0;      // greatest T it can run
  int64_t logit_rows = 0;  // greatest number of rows one run of the head takes
  int64_t hidden_size = 0;
  int64_t vocabulary_size = 0;
  std::vector<ProgramValue> values;
  std::vector<ProgramWeight> weights;
  std::vector<Operation> operations;
  int32_t head_begin = 0;  // operations from here run once per group of logit_rows wanted rows
  int64_t arena_bytes = 0;
  StateLayout state;
  KvLayout kv;
  int32_t hidden_in = kNone;  // value to fill before a run (MTP)
  int32_t hidden = kNone;     // [T, hidden] after the final norm; kept until the next run
  int32_t logits = kNone;     // [logit rows, vocabulary] float32
};

struct CompileOptions {
  int32_t rank = 0;                     // along the tensor axis
  DType activation = DType::kBFloat16;  // float32 or bfloat16
  DType weights = DType::kBFloat16;     // float32, bfloat16 or float8_e4m3 (where the official FP8 releases have it
                                        // and the rank's slice cuts no block)
  DType kv = DType::kBFloat16;
  int64_t tokens = 1;  // shape class
  int64_t logit_rows = 1;
  PassOptions passes;
};

// Inserts collectives, runs the passes and lays everything out. invalid_argument: a slice that does not divide, a rank
// outside the mesh, an unknown pass.
Result<Program> compile_program(Graph graph, const CompileOptions& options);

}  // namespace tokenspeed::compile
