// SPDX-License-Identifier: Apache-2.0
// Contexts: their memory, their number of threads, and which backend a name selects.
#include <gmock/gmock.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "cpu/quota.hpp"
#include "misa/error.hpp"
#include "misa/misa.h"
#include "misa/misa.hpp"
#include "support/backend_variable.hpp"
#include "support/check.hpp"
#include "support/inputs.hpp"

namespace misa::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

std::int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::int64_t all = 0;
  std::int64_t resident = 0;
  statm >> all >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

// Bytes per call that are not freed, after warm-up calls have filled caches.
template <class Call>
double bytes_kept(const Call& call) {
  constexpr int kCalls = 4000;
  for (int i = 0; i < kCalls / 10; ++i) {
    call();
  }
  const std::int64_t before = resident_bytes();
  for (int i = 0; i < kCalls; ++i) {
    call();
  }
  return static_cast<double>(resident_bytes() - before) / kCalls;
}

// Bytes per call that other causes may explain; leaking a thread arena would be kilobytes.
constexpr double kNoise = 256;

TEST(ContextMemory, ACallOfItsOwnKeepsNone) {
  PackSpec spec;
  spec.sequences = {{50, 2}};
  const RaggedInputs inputs(make_pack(spec));
  for (const std::string& backend : available_backends()) {
    if (backend.starts_with("cuda")) {
      continue;  // a call takes milliseconds there
    }
    for (const int threads : {1, 2, 4}) {
      EXPECT_LT(
          bytes_kept([&] { run(context_for(backend, threads), IndexerConfig::dsa(4), inputs); }),
          kNoise)
          << backend << ", " << threads << " threads";
    }
  }
}

TEST(ContextMemory, OnesThatLiveTogetherKeepNone) {
  PackSpec spec;
  spec.sequences = {{50, 2}};
  const RaggedInputs inputs(make_pack(spec));
  EXPECT_LT(bytes_kept([&] {
              const Context one = context_for("cpu", 2);
              const Context two = context_for("cpu", 2);
              run(one, IndexerConfig::dsa(4), inputs);
              run(two, IndexerConfig::dsa(4), inputs);
            }),
            kNoise);
}

TEST(ContextMemory, TheCInterfaceKeepsNone) {
  EXPECT_LT(bytes_kept([] {
              const misa_context_options options{"cpu", 2, 0};
              misa_context* context = nullptr;
              ASSERT_EQ(misa_context_create(&options, &context), MISA_OK);
              misa_context_destroy(context);
            }),
            kNoise);
}

// A folder that holds proc/ and sys/ as the kernel would show them.
class CpuQuota : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "misa-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void write(const std::string& file, const std::string& text) const {
    std::filesystem::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text;
  }

  [[nodiscard]] std::optional<int> quota() const { return cpu_quota(root_); }

  std::filesystem::path root_;
};

constexpr const char* kVersion2 =
    "22 1 0:20 / /proc rw,nosuid - proc proc rw\n"
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev - cgroup2 cgroup2 rw,nsdelegate\n";
constexpr const char* kVersion1 =
    "31 30 0:27 / /sys/fs/cgroup/cpuset rw shared:9 - cgroup cgroup rw,cpuset\n"
    "32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n";

TEST_F(CpuQuota, ThereIsNoneWhereNothingCanBeRead) { EXPECT_EQ(quota(), std::nullopt); }

TEST_F(CpuQuota, OfVersion2) {
  write("proc/self/mountinfo", kVersion2);
  write("proc/self/cgroup", "0::/system.slice/a.service\n");
  EXPECT_EQ(quota(), std::nullopt);
  const std::string group = "sys/fs/cgroup/system.slice/a.service/cpu.max";
  write(group, "max 100000\n");
  EXPECT_EQ(quota(), std::nullopt);
  write(group, "50000 100000\n");
  EXPECT_EQ(quota(), 1);
  write(group, "100000 100000\n");
  EXPECT_EQ(quota(), 1);
  write(group, "150000 100000\n");
  EXPECT_EQ(quota(), 2);
  write(group, "1600000 100000\n");
  EXPECT_EQ(quota(), 16);
  write("sys/fs/cgroup/system.slice/cpu.max", "30000 10000\n");  // a group above has less
  EXPECT_EQ(quota(), 3);
}

TEST_F(CpuQuota, OfVersion1) {
  write("proc/self/mountinfo", kVersion1);
  write("proc/self/cgroup", "4:cpuset:/\n3:cpu,cpuacct:/batch/job\n0::/\n");
  const std::string group = "sys/fs/cgroup/cpu,cpuacct/batch/job/";
  write(group + "cpu.cfs_period_us", "100000\n");
  write(group + "cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(quota(), std::nullopt);
  write(group + "cpu.cfs_quota_us", "50000\n");
  EXPECT_EQ(quota(), 1);
  write(group + "cpu.cfs_quota_us", "250000\n");
  EXPECT_EQ(quota(), 3);
  write("sys/fs/cgroup/cpu,cpuacct/batch/cpu.cfs_period_us", "100000\n");
  write("sys/fs/cgroup/cpu,cpuacct/batch/cpu.cfs_quota_us", "200000\n");
  EXPECT_EQ(quota(), 2);
}

// In a container the mount shows the container's group, while the path may be that of the host.
TEST_F(CpuQuota, OfAGroupThatIsTheMountItself) {
  write("proc/self/mountinfo",
        "32 30 0:28 /docker/1f2e /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n");
  write("proc/self/cgroup", "3:cpu:/docker/1f2e\n");
  write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "400000\n");
  EXPECT_EQ(quota(), 4);
  write("proc/self/cgroup", "3:cpu:/elsewhere\n");
  EXPECT_EQ(quota(), 4);
  write("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
  write("proc/self/cgroup", "0::/../..\n");
  write("sys/fs/cgroup/cpu.max", "200000 100000\n");
  EXPECT_EQ(quota(), 2);
}

TEST_F(CpuQuota, BrokenFilesSetNone) {
  write("proc/self/mountinfo", std::string("nonsense\n - \n1 2 3\n") + kVersion2);
  write("proc/self/cgroup", "\n:\n::\n0::/a\n");
  write("sys/fs/cgroup/a/cpu.max", "many 100000\n");
  EXPECT_EQ(quota(), std::nullopt);
  write("sys/fs/cgroup/a/cpu.max", "50000 0\n");
  EXPECT_EQ(quota(), std::nullopt);
  write("sys/fs/cgroup/a/cpu.max", "");
  EXPECT_EQ(quota(), std::nullopt);
}

TEST(ContextThreads, TheDefaultIsWhatTheProcessMayUse) {
  const int threads = Context().threads();
  EXPECT_GE(threads, 1);
  if (const auto quota = cpu_quota()) {
    EXPECT_LE(threads, *quota);
  }
}

std::string refusal(std::string_view backend) {
  try {
    const Context context({.backend = backend});
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    return error.what();
  }
  return "none";
}

TEST(ContextBackend, TheVariableNamesWhatAutoIs) {
  const BackendVariable variable("reference");
  EXPECT_EQ(Context().backend(), "reference");
  EXPECT_THAT(Context({.backend = "cpu"}).backend(), StartsWith("cpu"));
}

TEST(ContextBackend, AnUnknownNameIsRefusedWithItsSource) {
  EXPECT_THAT(refusal("abacus"), StartsWith("backend: expected auto, "));
  EXPECT_THAT(refusal("abacus"), HasSubstr("got 'abacus'"));
  const BackendVariable variable("abacus");
  EXPECT_THAT(refusal("auto"), StartsWith("MISA_BACKEND: expected auto, "));
  EXPECT_THAT(refusal("auto"), HasSubstr("got 'abacus'"));
  EXPECT_EQ(refusal("cpu"), "none");
}

// Whether the build or the machine lacks it, the message says what is needed.
TEST(ContextBackend, CudaIsRefusedByWhatItNeeds) {
  bool built = false;
  for (const BackendInfo& info : backends()) {
    if (info.name.starts_with("cuda")) {
      built = true;
      EXPECT_TRUE(info.available || refusal(info.name).starts_with("backend: '" + info.name +
                                                                   "' needs " + info.requirement));
    }
  }
  if (!built) {
    for (const std::string name : {"cuda", "cuda-sm90", "cuda-generic"}) {
      EXPECT_EQ(refusal(name), "backend: '" + name +
                                   "' needs a build with CUDA backends (MISA_BUILD_CUDA=ON), "
                                   "which this one is not");
    }
  }
}

}  // namespace
}  // namespace misa::test
