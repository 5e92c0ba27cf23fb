// Kernels of a captured step may be launched before those in front of them have ended (launch.py), on GPUs that can.

// From here on everything that was launched earlier on the stream has ended, and is visible; whatever is launched next
// may begin. Every block calls it before it returns, looks at what others write or writes itself: a kernel that ended
// without it would let the next one pass a third that still runs.
__device__ void await_earlier_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}
