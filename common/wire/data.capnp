# Messages of the data plane: worker <-> shard. Meta of an OutMessage; bulk rows and pages travel in its body.
# Sizes are checked against common/limits.h before use (data_codec.cc). New fields at the end only.
@0xd2c0a7a1b3f04e11;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("icecache::wire::schema");

struct Status {
  code @0 :UInt8;
  message @1 :Text;
}

struct AttachRequest {        # first message on every data connection
  protocolVersion @0 :UInt16;
  ticket @1 :Data;            # issued on the control plane
}
struct AttachReply {
  protocolVersion @0 :UInt16;
  shard @1 :UInt16;
  shardCount @2 :UInt16;
  extents @3 :Text;           # abstract unix socket that hands out the tenant's extents (common/extent_socket.h); empty: none
  pushes @4 :Bool;            # OfferMemory may be sent: this server pushes pages into memory of GPUs
}

# Body: for each head of `kvHeads`, in order: K rows [tokenCount, headDim], then V rows, in the shape's dtype.
struct PutRowsRequest {
  context @0 :UInt64;
  epoch @1 :UInt64;
  layer @2 :UInt16;
  kvHeads @3 :List(UInt16);   # heads of this layer that the shard owns, ascending
  firstPosition @4 :UInt32;
  tokenCount @5 :UInt32;
}
struct PutRowsReply { nextPosition @0 :UInt32; }

# All rows of the layer in [0, tokenCount) are there: index them. Sinks and the unindexed tail stay apart.
# Body: query energy, f32 [kvHeads, headDim], or empty; then for each of `layouts` its tokens u32 (row indices of the
# index, page by page), tokens of each page u8, pages of each group u8.
struct BuildLayout {
  tokens @0 :UInt32;
  pages @1 :UInt32;
  groups @2 :UInt32;
}
struct BuildRequest {
  context @0 :UInt64;
  epoch @1 :UInt64;
  layer @2 :UInt16;
  kvHeads @3 :List(UInt16);
  tokenCount @4 :UInt32;      # tokens of the tail segment that must have arrived
  layouts @5 :List(BuildLayout);  # by content, computed by the worker: of every head, or none
}
struct BuildReply { pages @0 :UInt32; }

struct ResidentPage {         # a page the worker holds: not sent again unless it has changed
  segment @0 :UInt64;
  page @1 :UInt32;
  version @2 :UInt32;
  fill @3 :UInt8;
}
struct SelectHead {
  kvHead @0 :UInt16;
  resident @1 :List(ResidentPage);
  localLse @2 :List(Float32); # [group] or empty
  near @3 :List(UInt32);      # positions of tokens that probably matter; empty: look everywhere
}
# Body: queries f32 [heads, group, headDim]; then, when appendCount > 0, for each head K rows [appendCount, headDim]
# and V rows: tokens that left the worker's window. They are part of this selection.
struct SelectRequest {
  context @0 :UInt64;
  epoch @1 :UInt64;
  layer @2 :UInt16;
  heads @3 :List(SelectHead);
  maxPages @4 :UInt32;
  readCap @5 :UInt32;
  minMass @6 :Float32;
  rank @7 :UInt8;
  flags @8 :UInt8;            # bit 0: no residual; 1: name missing pages by extent; 2: attend to missing pages;
                              # 3: pages in the body may be coded in int8; 4: check (metrics)
  appendFirst @9 :UInt32;     # position of the first appended token
  appendCount @10 :UInt32;
  pushOffset @11 :UInt32;     # region of the memory that this connection has offered: missing pages go there, as far as
  pushBytes @12 :UInt32;      # they fit; the server may write there until it has answered. 0: none
}
# Several Selects of one connection, as a rule one a sequence, in one message. Each is a request of its own: under its own id,
# for its own context, with its own answer. Body: theirs, one after the other.
struct BatchedSelect {
  id @0 :UInt64;
  meta @1 :Data;              # a SelectRequest
  bodyBytes @2 :UInt32;
}
struct SelectBatch { selects @0 :List(BatchedSelect); }
struct PagePayload {
  segment @0 :UInt64;
  page @1 :UInt32;
  version @2 :UInt32;
  fill @3 :UInt8;
  from @4 :UInt8;             # rows [from, fill) are in the body: K rows, V rows, positions u32. from == fill: resident
  logMass @5 :Float32;
  checksum @6 :UInt64;        # of the whole page's content (common/checksum.h)
  offset @7 :UInt32;          # of the page's frame in its extent, place mapped; of its rows in the offered memory, place pushed
  extent @8 :UInt64;          # serial of the extent; place mapped only
  place @9 :UInt8;            # of the rows [from, fill): 0 in the body, 1 mapped, 2 attended to by the server, 3 pushed: K rows, then
                              # V rows at offset; positions are in the body
  codedBytes @10 :UInt32;     # > 0: the body holds so many bytes of int8 code (kernels/int8_rows.h) for K and V, then positions
  codedChecksum @11 :UInt64;  # of the code and the positions, seeded like the page's
}
struct HeadSelection {
  kvHead @0 :UInt16;
  pages @1 :List(PagePayload);
  residual @2 :Data;          # AttentionStates::flat of [group], f32; empty when none
  coveredMass @3 :Float32;
  tokensRead @4 :UInt32;
}
struct SelectReply {
  heads @0 :List(HeadSelection);
  selectNanos @1 :UInt64;     # server time spent in selection
  gatherNanos @2 :UInt64;
  nextPosition @3 :UInt32;    # after the append
}

# Rows in the order of their positions: sinks of the chain's first segment, unindexed tail of its last, or any range.
# Reply body: for each head K rows [count, headDim], then V rows.
struct FetchRowsRequest {
  context @0 :UInt64;
  epoch @1 :UInt64;
  layer @2 :UInt16;
  kvHeads @3 :List(UInt16);
  part @4 :Part;
  enum Part { sinks @0; tail @1; range @2; }
  firstPosition @5 :UInt32;   # part range only: these positions, wherever their rows are
  tokenCount @6 :UInt32;
}
struct FetchRowsReply {
  firstPosition @0 :UInt32;
  count @1 :UInt32;
  checksum @2 :UInt64;        # of the whole body
}

# Pages by name: after a checksum mismatch. Reply: SelectReply with one HeadSelection, whole pages.
struct FetchPagesRequest {
  context @0 :UInt64;
  epoch @1 :UInt64;
  layer @2 :UInt16;
  kvHead @3 :UInt16;
  pages @4 :List(ResidentPage);
  flags @5 :UInt8;            # as SelectRequest, bit 1 only
}

# What a worker needs to read extents of its tenant by itself: reply mode remote. Extents that are gone, or another
# tenant's, are left out of the reply.
struct ExtentKeysRequest {
  context @0 :UInt64;
  epoch @1 :UInt64;
  serials @2 :List(UInt64);
}
struct ExtentKeysReply {
  serials @0 :List(UInt64);
  keys @1 :List(Data);        # ReadableMemory::key of each (common/transport.h)
}

# Memory of the worker's GPU, for servers on its host to push pages into. At most one a connection: another replaces it.
# It is let go when the connection ends, or the last lease that was attached there.
struct OfferMemoryRequest {
  ticket @0 :Data;            # of a context that this connection has attached
  handle @1 :Data;            # kernels/gpu/memory_handle.h
}
struct OfferMemoryReply {}
