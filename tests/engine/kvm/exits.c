/* Exit round trips by a C program: "out 0x80, al" in real mode, N times. Prints the thread's CPU time an exit, in ns. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
    int n = atoi(argv[1]);
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    char *memory = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {0, 0, 0, 1 << 20, (unsigned long)memory};
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = 0x7c00, .rflags = 2};

    ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
    ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
    memcpy(memory + 0x7c00, "\xe6\x80\xeb\xfc", 4);
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    struct kvm_run *run =
        mmap(0, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    ioctl(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    ioctl(vcpu, KVM_SET_SREGS, &sregs);
    ioctl(vcpu, KVM_SET_REGS, &regs);

    volatile long long sum = 0;
    long long begin = 0;
    for (int i = -n / 10; i < n; i++) {
        if (i == 0)
            begin = now();
        if (ioctl(vcpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO)
            return 1;
        sum += ((char *)run)[run->io.data_offset];
    }
    printf("%lld\n", (now() - begin) / n);
    return 0;
}
