// The control plane under TLS, between a real server and the client that workers use.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>

#include "common/control_client.h"
#include "tests/support/certificate.h"
#include "tests/support/process.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using ::testing::HasSubstr;

class ControlTls : public ::testing::Test {
 protected:
  ControlTls() {
    MakeCertificate(dir_.path("server"), "IP:127.0.0.1");
    MakeCertificate(dir_.path("other"), "IP:127.0.0.1,DNS:localhost");
  }
  std::vector<std::string> Args(const std::string& cert = "server.pem",
                                const std::string& key = "server.key") const {
    return {"--memory-size", "64MiB",         "--threads", "1",
            "--tls-cert",    dir_.path(cert), "--tls-key", dir_.path(key)};
  }
  Status Hello(const std::string& address, const std::string& ca) {
    ControlClientOptions options;
    options.address = address;
    options.tls_ca = ca;
    options.deadline = 5s;
    auto client = ControlClient::Connect(reactor_, options);
    if (!client.ok()) return client.status();
    return (*client)->List().status();
  }
  TempDir dir_;
  std::unique_ptr<Clock> clock_ = MakeSteadyClock();
  Reactor reactor_{*clock_, Duration::zero()};
};

TEST_F(ControlTls, AClientThatTrustsTheCertificateIsServed) {
  TestServer server(Args());
  EXPECT_EQ(Hello(server.address(), dir_.path("server.pem")).ToString(), "OK");
  EXPECT_TRUE(server.process().WaitForOutput("TLSv1.3", 5s)) << server.process().Err();
}

TEST_F(ControlTls, ACertificateOfSomebodyElseIsRefused) {
  TestServer server(Args());
  const Status status = Hello(server.address(), dir_.path("other.pem"));
  EXPECT_EQ(status.code(), StatusCode::kUnauthenticated) << status.ToString();
  EXPECT_THAT(status.message(), HasSubstr("certificate"));
}

TEST_F(ControlTls, ACertificateForAnotherNameIsRefused) {
  TestServer server(Args());
  const std::string by_name = "localhost:" + std::to_string(server.port());
  EXPECT_EQ(Hello(by_name, dir_.path("server.pem")).code(), StatusCode::kUnauthenticated);
  TestServer both(Args("other.pem", "other.key"));
  EXPECT_EQ(Hello("localhost:" + std::to_string(both.port()), dir_.path("other.pem")).ToString(),
            "OK");
}

TEST_F(ControlTls, NobodyIsServedInTheClear) {
  TestServer server(Args());
  const Status status = Hello(server.address(), "");
  EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status.ToString();
  EXPECT_THAT(status.message(), HasSubstr("--tls-ca"));
  EXPECT_EQ(Hello(server.address(), dir_.path("server.pem")).ToString(), "OK");
}

TEST_F(ControlTls, AServerInTheClearIsNoTlsServer) {
  TestServer server({"--memory-size", "64MiB", "--threads", "1"});
  EXPECT_FALSE(Hello(server.address(), dir_.path("server.pem")).ok());
  EXPECT_EQ(Hello(server.address(), "").ToString(), "OK");
}

// A certificate is renewed under the same names; SIGHUP takes it over, and a bad one changes nothing.
TEST_F(ControlTls, AHangUpTakesOverARenewedCertificate) {
  TestServer server(Args());
  const std::string old_roots = dir_.path("old.pem"), new_roots = dir_.path("other.pem");
  WriteFile(old_roots, ReadFile(dir_.path("server.pem")));
  WriteFile(dir_.path("server.pem"), "no certificate");
  server.process().Signal(SIGHUP);
  ASSERT_TRUE(server.process().WaitForOutput("certificate not reloaded, the old one stays", 10s));
  EXPECT_THAT(server.process().Err(), HasSubstr("server.pem"));
  EXPECT_EQ(Hello(server.address(), old_roots).ToString(), "OK");

  ControlClientOptions options;
  options.address = server.address();
  options.tls_ca = old_roots;
  auto standing = ControlClient::Connect(reactor_, options);
  ASSERT_TRUE(standing.ok());
  WriteFile(dir_.path("server.key"), ReadFile(dir_.path("other.key")));
  WriteFile(dir_.path("server.pem"), ReadFile(new_roots));
  server.process().Signal(SIGHUP);
  ASSERT_TRUE(server.process().WaitForOutput("certificate reloaded", 10s));
  EXPECT_EQ(Hello(server.address(), new_roots).ToString(), "OK");
  EXPECT_EQ(Hello(server.address(), old_roots).code(), StatusCode::kUnauthenticated);
  EXPECT_TRUE((*standing)->List().ok()) << "a connection that stands is left alone";
}

TEST_F(ControlTls, BadFilesAreNamedBeforeAnythingStarts) {
  const auto refused = [&](const std::vector<std::string>& args) {
    Process p("icecache-server", args);
    const ProcessResult r = p.Wait(20s);
    EXPECT_TRUE(r.exited && r.exit_code != 0);
    return p.Err();
  };
  EXPECT_THAT(refused(Args("absent.pem")), HasSubstr("absent.pem"));
  EXPECT_THAT(refused(Args("server.pem", "other.key")), HasSubstr("other.key"));
  EXPECT_EQ(chmod(dir_.path("server.key").c_str(), 0644), 0);
  EXPECT_THAT(refused(Args()), HasSubstr("chmod 600"));
}

}  // namespace
}  // namespace icecache::test
