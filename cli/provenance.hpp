// SPDX-License-Identifier: Apache-2.0
// Where results come from: when, by which command, from which files.
#pragma once

#include <string>

namespace misa::cli {

// The date and time in UTC, e.g. 2026-11-30T12:00:00Z.
std::string utc_now();

// This program's command line, quoted for a shell where it has to be; empty where the system does
// not say.
std::string command_line();

// The SHA-256 of a file's bytes, 64 hexadecimal digits. Throws Error.
std::string sha256_of(const std::string& file);

}  // namespace misa::cli
