"""What the compiler made of the kernels: ahead-of-time builds, their machine code, gates, cost model and choice."""
