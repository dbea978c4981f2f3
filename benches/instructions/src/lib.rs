//! Instruction counts of the code that only computes, under Valgrind: the same on every machine, however busy, so that a change can be refused by them.
//! What enters the kernel is not measured here. `cargo bench -p tun_driver_instructions`; it wants Valgrind and `gungraun-runner` of the same version.
