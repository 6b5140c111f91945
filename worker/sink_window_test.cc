#include "worker/sink_window.h"

#include <gtest/gtest.h>

#include <cstring>
#include <deque>

#include "worker/test_rows.h"

namespace icecache {
namespace {

using test::Sequence;

// Row of `token` in the window is somewhere in the ring.
bool Holds(const TokenRows& rows, const Sequence& s, KvHeadId head, uint32_t token) {
  const size_t bytes = rows.row_bytes();
  for (uint32_t i = 0; i < rows.count; ++i) {
    if (std::memcmp(rows.k + i * bytes, s.rows.k(head).data() + token * bytes, bytes) == 0 &&
        std::memcmp(rows.v + i * bytes, s.rows.v(head).data() + token * bytes, bytes) == 0) {
      return true;
    }
  }
  return false;
}

LayerRows Token(const Sequence& s, uint32_t token) {
  LayerRows rows(s.shape, TokenPos(token), 1);
  rows.StoreToken(TokenPos(token), s.k.data() + token * s.row(), s.v.data() + token * s.row());
  return rows;
}

void CheckAgainstModel(uint32_t sinks, uint32_t window, uint32_t document, uint64_t seed) {
  SCOPED_TRACE(testing::Message() << "sinks " << sinks << " window " << window << " document "
                                  << document << " seed " << seed);
  std::mt19937_64 rng(seed);
  const ModelShape shape = test::SmallShape();
  const Sequence s(shape, rng, document + 50);
  LayerRows head_rows(shape, TokenPos(0), document);
  {
    std::vector<float> k(s.k.begin(), s.k.begin() + static_cast<ptrdiff_t>(document * s.row()));
    std::vector<float> v(s.v.begin(), s.v.begin() + static_cast<ptrdiff_t>(document * s.row()));
    head_rows.RoundAndStore(0, document, k.data(), v.data());
  }
  SinkWindow tested(shape, sinks, window);
  const LayerId layer(1);
  tested.LoadDocument(layer, head_rows);
  const uint32_t sink_count = std::min(sinks, document);
  std::deque<uint32_t> model;
  for (uint32_t t = document - std::min(window, document - sink_count); t < document; ++t) {
    model.push_back(t);
  }
  LayerRows left(shape, TokenPos(0), 1);
  for (uint32_t t = document; t < document + 50; ++t) {
    ASSERT_EQ(tested.next(layer).value, t);
    LayerRows leaving(shape, TokenPos(0), 1);
    const auto peeked = tested.PeekLeaving(layer, &leaving);
    ASSERT_EQ(peeked.has_value(), window > 0 && model.size() == window);
    const auto pushed_out = tested.Append(layer, Token(s, t), &left);
    model.push_back(t);
    ASSERT_EQ(pushed_out.has_value(), model.size() > window);
    if (pushed_out) {
      ASSERT_EQ(pushed_out->value, model.front());
      if (peeked) {
        ASSERT_EQ(*peeked, *pushed_out);
        ASSERT_TRUE(Holds(leaving.view(KvHeadId(1)), s, KvHeadId(1), model.front()));
      }
      for (uint16_t h = 0; h < shape.kv_heads; ++h) {
        ASSERT_TRUE(Holds(left.view(KvHeadId(h)), s, KvHeadId(h), model.front()));
      }
      model.pop_front();
    }
    for (uint16_t h = 0; h < shape.kv_heads; ++h) {
      const TokenRows held = tested.window(layer, KvHeadId(h));
      ASSERT_EQ(held.count, model.size());
      for (const uint32_t token : model) ASSERT_TRUE(Holds(held, s, KvHeadId(h), token));
      const TokenRows first = tested.sinks(layer, KvHeadId(h));
      ASSERT_EQ(first.count, sink_count);
      for (uint32_t i = 0; i < sink_count; ++i) ASSERT_TRUE(Holds(first, s, KvHeadId(h), i));
    }
  }
}

TEST(SinkWindow, HoldsTheFirstAndTheMostRecentTokens) {
  uint64_t seed = 1;
  for (const uint32_t sinks : {0u, 4u, 16u}) {
    for (const uint32_t window : {1u, 7u, 16u, 64u}) {
      for (const uint32_t document : {1u, 5u, 20u, 100u}) {
        CheckAgainstModel(sinks, window, document, seed++);
      }
    }
  }
}

TEST(SinkWindow, WithoutAWindowTheNewTokenLeavesAtOnce) { CheckAgainstModel(4, 0, 20, 99); }

TEST(SinkWindow, ACopyIsASnapshotToRollBackTo) {
  std::mt19937_64 rng(5);
  const ModelShape shape = test::SmallShape();
  const Sequence s(shape, rng, 60);
  SinkWindow window(shape, 4, 8);
  LayerRows left(shape, TokenPos(0), 1);
  for (uint32_t t = 0; t < 20; ++t) (void)window.Append(LayerId(0), Token(s, t), &left);
  const SinkWindow snapshot = window;
  for (uint32_t t = 20; t < 40; ++t) (void)window.Append(LayerId(0), Token(s, t), &left);
  window = snapshot;
  EXPECT_EQ(window.next(LayerId(0)).value, 20u);
  for (uint32_t t = 12; t < 20; ++t) {
    EXPECT_TRUE(Holds(window.window(LayerId(0), KvHeadId(1)), s, KvHeadId(1), t));
  }
}

TEST(SinkWindow, PartsFromTheServerEqualTheWholeDocument) {
  std::mt19937_64 rng(6);
  const ModelShape shape = test::SmallShape();
  const Sequence s(shape, rng, 40);
  SinkWindow whole(shape, 4, 8);
  whole.LoadDocument(LayerId(0), s.rows);
  LayerRows sinks(shape, TokenPos(0), 4), tail(shape, TokenPos(32), 8);
  const size_t bytes = shape.row_bytes();
  for (uint16_t h = 0; h < shape.kv_heads; ++h) {
    std::memcpy(sinks.k(KvHeadId(h)).data(), s.rows.k(KvHeadId(h)).data(), 4 * bytes);
    std::memcpy(sinks.v(KvHeadId(h)).data(), s.rows.v(KvHeadId(h)).data(), 4 * bytes);
    std::memcpy(tail.k(KvHeadId(h)).data(), s.rows.k(KvHeadId(h)).data() + 32 * bytes, 8 * bytes);
    std::memcpy(tail.v(KvHeadId(h)).data(), s.rows.v(KvHeadId(h)).data() + 32 * bytes, 8 * bytes);
  }
  SinkWindow parts(shape, 4, 8);
  parts.LoadParts(LayerId(0), sinks, tail);
  for (uint16_t h = 0; h < shape.kv_heads; ++h) {
    const TokenRows a = whole.window(LayerId(0), KvHeadId(h));
    const TokenRows b = parts.window(LayerId(0), KvHeadId(h));
    ASSERT_EQ(a.count, b.count);
    EXPECT_EQ(std::memcmp(a.k, b.k, a.count * bytes), 0);
    EXPECT_EQ(std::memcmp(a.v, b.v, a.count * bytes), 0);
  }
  EXPECT_EQ(parts.next(LayerId(0)), whole.next(LayerId(0)));
  EXPECT_EQ(parts.bytes(), uint64_t{2} * (4 + 8) * 2 * 2 * bytes);  // layers, rows, heads, K and V
}

}  // namespace
}  // namespace icecache
