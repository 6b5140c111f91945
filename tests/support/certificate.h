// A self-signed certificate made on the spot, so that no private key lies in the repository.
#pragma once

#include <string>

namespace icecache::test {

// Writes PATH.pem and PATH.key (mode 600): P-256, valid for a day from an hour ago, for these
// subject alternative names ("IP:127.0.0.1,DNS:localhost").
void MakeCertificate(const std::string& path, const std::string& names);

}  // namespace icecache::test
