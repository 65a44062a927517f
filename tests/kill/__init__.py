"""Runs that are interrupted at random and gone on with, against one that is not: `python -m tests.kill --rounds 100`.

A round takes a run of one of the trainers and interrupts it one to three times: killed (SIGKILL) at a random write to
its folder or at a random moment, or ended by a disk that is full from a random write on. In some rounds the newest
checkpoint is damaged before the run goes on, or another process holds the run's lock, which must be refused first, or
two processes go on with the run at once, of which one must. What the run comes to must be that of the unbroken run, to
the bit.
"""
