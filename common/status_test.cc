#include "common/status.h"

#include <gtest/gtest.h>

#include <memory>

namespace icecache {
namespace {

TEST(Status, DefaultIsOk) {
  EXPECT_TRUE(Status().ok());
  EXPECT_EQ(OkStatus().code(), StatusCode::kOk);
  EXPECT_EQ(OkStatus().ToString(), "OK");
}

TEST(Status, NamesItsCodeAndMessage) {
  EXPECT_EQ(NotFound("context 'a'").ToString(), "NOT_FOUND: context 'a'");
  EXPECT_EQ(Internal("").ToString(), "INTERNAL");
}

TEST(Status, MakersAndNamesAgreeWithTheWireNumbers) {
  const std::pair<Status, const char*> all[] = {
      {OkStatus(), "OK"},
      {InvalidArgument("x"), "INVALID_ARGUMENT"},
      {NotFound("x"), "NOT_FOUND"},
      {AlreadyExists("x"), "ALREADY_EXISTS"},
      {PermissionDenied("x"), "PERMISSION_DENIED"},
      {Unauthenticated("x"), "UNAUTHENTICATED"},
      {ResourceExhausted("x"), "RESOURCE_EXHAUSTED"},
      {FailedPrecondition("x"), "FAILED_PRECONDITION"},
      {OutOfRange("x"), "OUT_OF_RANGE"},
      {Unavailable("x"), "UNAVAILABLE"},
      {DeadlineExceeded("x"), "DEADLINE_EXCEEDED"},
      {DataLoss("x"), "DATA_LOSS"},
      {Cancelled("x"), "CANCELLED"},
      {Unimplemented("x"), "UNIMPLEMENTED"},
      {Internal("x"), "INTERNAL"},
  };
  int number = 0;
  for (const auto& [status, name] : all) {
    EXPECT_EQ(static_cast<int>(status.code()), number++) << name;
    EXPECT_EQ(StatusCodeName(status.code()), name);
  }
  EXPECT_EQ(StatusCodeName(static_cast<StatusCode>(200)), "UNKNOWN");
}

TEST(Status, ContextGoesBeforeTheMessageAndLeavesOkAlone) {
  const Status inner = OutOfRange("position 9");
  EXPECT_EQ(inner.WithContext("layer 3").ToString(), "OUT_OF_RANGE: layer 3: position 9");
  EXPECT_TRUE(OkStatus().WithContext("layer 3").ok());
  EXPECT_EQ(OkStatus().WithContext("layer 3").message(), "");
}

TEST(Result, HoldsAValueOrItsAbsence) {
  Result<int> value(3);
  ASSERT_TRUE(value.ok());
  EXPECT_EQ(*value, 3);
  EXPECT_TRUE(value.status().ok());
  const Result<int> error(NotFound("gone"));
  EXPECT_FALSE(error.ok());
  EXPECT_EQ(error.status().code(), StatusCode::kNotFound);
}

TEST(Result, MovesWhatCannotBeCopied) {
  Result<std::unique_ptr<int>> result(std::make_unique<int>(5));
  const std::unique_ptr<int> taken = std::move(result).value();
  EXPECT_EQ(*taken, 5);
}

TEST(ResultDeathTest, ValueOfAnErrorAndOkWithoutValueEndTheProcess) {
  Result<int> error(NotFound("gone"));
  EXPECT_DEATH((void)error.value(), "invariant broken: ok\\(\\)");
  EXPECT_DEATH((void)Result<int>(OkStatus()), "invariant broken");
  EXPECT_DEATH(KV_CHECK(1 + 1 == 3), "status_test.cc:[0-9]+: invariant broken: 1 \\+ 1 == 3");
}

Result<int> Half(int n) {
  if (n % 2 != 0) return InvalidArgument("odd");
  return n / 2;
}
Result<int> Quarter(int n) {
  KV_ASSIGN_OR_RETURN(const int half, Half(n));
  KV_ASSIGN_OR_RETURN(const int quarter, Half(half));
  return quarter;
}
Status Even(int n) {
  KV_RETURN_IF_ERROR(Half(n).status());
  return OkStatus();
}

TEST(StatusMacros, ReturnTheFirstError) {
  EXPECT_EQ(*Quarter(8), 2);
  EXPECT_EQ(Quarter(6).status().message(), "odd");
  EXPECT_EQ(Quarter(7).status().message(), "odd");
  EXPECT_TRUE(Even(2).ok());
  EXPECT_EQ(Even(3).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace icecache
