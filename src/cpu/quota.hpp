// SPDX-License-Identifier: Apache-2.0
// The processor time that the process's control groups allow.
#pragma once

#include <filesystem>
#include <optional>

namespace misa {

// How many processors' time the CFS quotas of the process's control groups (versions 1 and 2) and
// of their parents allow, rounded up; none if no quota is set or can be read. `root` is the folder
// that holds proc/ and sys/.
std::optional<int> cpu_quota(const std::filesystem::path& root = "/");

}  // namespace misa
