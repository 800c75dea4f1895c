// PyTorch's CPU allocator, with aligned memory by malloc: see kernels/heap.py.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr std::uintptr_t ALIGNMENT = 64;  // what PyTorch promises

// Stands right before the memory that is handed out. PyTorch hands back the aligned address alone, and sometimes memory
// that an earlier allocator of the process gave: that has no mark, and goes to free as it is.
struct Header {
    std::uint64_t mark;
    void *from_malloc;
};
constexpr std::uint64_t MARK = 0x9c5f2ea1d7b34608;

void give_back(void *memory) {
    if (!memory) return;
    c10::profiledCPUMemoryReporter().Delete(memory);
    Header *header = static_cast<Header *>(memory) - 1;
    if (header->mark != MARK) {
        std::free(memory);
        return;
    }
    header->mark = 0;
    std::free(header->from_malloc);
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(std::size_t bytes) override {
        const c10::Device cpu(c10::DeviceType::CPU);
        if (!bytes) return {nullptr, nullptr, &give_back, cpu};
        void *from_malloc = std::malloc(bytes + sizeof(Header) + ALIGNMENT);
        TORCH_CHECK(from_malloc, "can't allocate memory: you tried to allocate ", bytes, " bytes");
        const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(from_malloc) + sizeof(Header);
        Header *memory = reinterpret_cast<Header *>((first + ALIGNMENT - 1) & ~(ALIGNMENT - 1));
        memory[-1] = {MARK, from_malloc};
        c10::profiledCPUMemoryReporter().New(memory, bytes);
        return {memory, memory, &give_back, cpu};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
    void copy_data(void *to, const void *from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator allocator;

}  // namespace

extern "C" void take_over() { c10::SetCPUAllocator(&allocator, 255); }
