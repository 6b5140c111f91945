# Messages of the control plane: framed on a TCP connection as u32 word count (little endian) + one flat message.
@0xa9c5b1e80d7742f3;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("icecache::wire::schema");

struct Shape {
  layers @0 :UInt32;
  kvHeads @1 :UInt32;
  queryHeads @2 :UInt32;
  headDim @3 :UInt32;
  dtype @4 :UInt8;
}
struct SegmentInfo {
  id @0 :UInt64;
  tokens @1 :UInt32;          # all: sinks, indexed, tail
  sealed @2 :Bool;
  references @3 :UInt32;      # contexts that hold it
  bytes @4 :UInt64;           # page frames and row buffers
  indexBytes @5 :UInt64;
  merged @6 :UInt32;          # segments that were put together in it, since the server's start
}
struct ContextInfo {
  id @0 :UInt64;
  name @1 :Text;
  shape @2 :Shape;
  model @3 :Text;             # identity of the weights: name and revision, part of what may be shared
  tokens @4 :UInt32;          # of the whole chain
  sinkTokens @5 :UInt32;
  windowTokens @6 :UInt32;
  policy @7 :Text;
  sealed @8 :Bool;            # the tail is sealed: may be opened and forked
  published @9 :Bool;
  segments @10 :List(SegmentInfo);
  tenant @11 :Text;
  seed @12 :UInt64;
  tailTokens @13 :UInt32;     # rows in the unindexed tail of the last sealed segment
  durable @14 :Bool;          # on disk: survives the server
  shared @15 :Bool;           # published to all tenants
  prefixKeys @16 :UInt32;     # keys that its tokens are found by; 0: matchPrefix does not find it
  prefixForks @17 :UInt64;    # forks that began with a match, and what they did not prefill
  prefixTokens @18 :UInt64;
}
struct PrefixCandidate {      # a published context that may begin with the tokens asked for
  owner @0 :Text;             # its tenant
  name @1 :Text;
  tokens @2 :UInt32;          # so many of them, if key is theirs (common/prefix_key.h)
  key @3 :Data;
}
struct SharedFrames {         # page frames of a worker's device, for others of its tenant on its host
  id @0 :UInt64;              # of the server, never given out again
  memory @1 :Data;            # names the frames (kernels/gpu/memory_handle.h)
  directory @2 :Data;         # names what says which page is in which (worker/page_directory.h)
}
struct ShardAddress { address @0 :Text; }
struct Grant {                # the right to use a context over the data plane
  context @0 :ContextInfo;
  epoch @1 :UInt64;
  ticket @2 :Data;            # unguessable; first message on each data connection
  leaseMillis @3 :UInt32;
}

struct Request {
  id @0 :UInt64;
  union {
    hello :group { protocolVersion @1 :UInt16; tenant @2 :Text; secret @3 :Text; client @4 :Text; }
    create :group { name @5 :Text; shape @6 :Shape; model @7 :Text; sinkTokens @8 :UInt32;
                    windowTokens @9 :UInt32; policy @10 :Text; seed @11 :UInt64; }
    open @12 :Text;           # read only, by name: must be published
    fork :group { parent @13 :Text; name @14 :Text;     # parent: a sealed context's name
                  tokens @26 :UInt32;                   # fork behind so many tokens; 0: all
                  owner @27 :Text;                      # of a shared parent: its tenant; empty: the caller
                  key @28 :Data; }                      # refuse unless this is the key of these tokens; may be empty
    seal @15 :UInt64;         # context id; all rows of all layers must have arrived
    publish @16 :UInt64;
    release @17 :UInt64;      # give the lease back; an unpublished context is dropped
    drop @18 :Text;
    list @19 :Void;
    describe @20 :Text;
    renew @21 :Void;          # all leases of this connection
    inspect :group { topic @22 :UInt8; name @23 :Text; }  # a report in JSON; name: of a context, or empty
    drain @24 :Void;          # as SIGTERM; for admins
    matchPrefix :group { keys @29 :Data;                # 32 bytes for each whole block of 256 tokens, in order
                         tokens @30 :UInt32;            # longest prefix that is of use
                         shared @31 :Bool; }            # also contexts that other tenants have shared
    shareFrames :group { host @34 :Text;                # of the worker; frames are shared within one
                         memory @35 :Data;              # its frames, as in SharedFrames; empty: none
                         directory @36 :Data; }
  }
  publishDurable @25 :Bool;   # with publish: answered when the context is on disk
  publishShared @32 :Bool;    # with publish: other tenants may fork it
  sealKeys @33 :Data;         # with seal: keys of all blocks of its tokens and of all tokens; may be empty
}
struct Reply {
  id @0 :UInt64;
  union {
    error :group { code @1 :UInt8; message @2 :Text; }
    hello :group { protocolVersion @3 :UInt16; version @4 :Text; shards @5 :List(ShardAddress);
                   heartbeatMillis @6 :UInt32; }
    grant @7 :Grant;
    done @8 :Void;
    contexts @9 :List(ContextInfo);
    report @10 :Text;         # JSON
    prefixes @11 :List(PrefixCandidate);  # longest first
    frames @12 :List(SharedFrames);       # of the others
  }
}
