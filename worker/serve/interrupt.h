// SIGINT and SIGTERM as a question: whoever waits or computes asks now and then and ends in order.
// A second signal ends the process at once.
#pragma once

namespace icecache {

void CatchInterrupts();  // once, in main(), after ApplyUcxEnvironment
bool Interrupted();      // any thread

}  // namespace icecache
