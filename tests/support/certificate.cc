#include "tests/support/certificate.h"

#include <openssl/ec.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>

#include <cstdio>
#include <memory>

#include "common/status.h"

namespace icecache::test {

void MakeCertificate(const std::string& path, const std::string& names) {
  const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const std::unique_ptr<X509, decltype(&X509_free)> certificate(X509_new(), X509_free);
  KV_CHECK(key && certificate);
  X509* const x = certificate.get();
  X509_set_version(x, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(x), 1);
  X509_gmtime_adj(X509_getm_notBefore(x), -3600);
  X509_gmtime_adj(X509_getm_notAfter(x), 86400);
  X509_set_pubkey(x, key.get());
  X509_NAME* const name = X509_get_subject_name(x);
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>("icecache test"), -1, -1, 0);
  X509_set_issuer_name(x, name);
  X509V3_CTX context;
  X509V3_set_ctx(&context, x, x, nullptr, nullptr, 0);
  X509_EXTENSION* const extension =
      X509V3_EXT_conf_nid(nullptr, &context, NID_subject_alt_name, names.c_str());
  KV_CHECK(extension != nullptr);
  X509_add_ext(x, extension, -1);
  X509_EXTENSION_free(extension);
  KV_CHECK(X509_sign(x, key.get(), EVP_sha256()) > 0);
  FILE* file = std::fopen((path + ".pem").c_str(), "w");
  KV_CHECK(file != nullptr && PEM_write_X509(file, x) == 1);
  std::fclose(file);
  file = std::fopen((path + ".key").c_str(), "w");
  KV_CHECK(file != nullptr && chmod((path + ".key").c_str(), 0600) == 0 &&
           PEM_write_PrivateKey(file, key.get(), nullptr, nullptr, 0, nullptr, nullptr) == 1);
  std::fclose(file);
}

}  // namespace icecache::test
