/*-------------------------------------------------------------------------
 *
 * launcher.h
 *	  The process that starts workers.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_LAUNCHER_H
#define STATBUFFER_LAUNCHER_H

extern void launcher_register(void);
extern void launcher_ensure(void);
extern bool launcher_await_saved(void);
extern void launcher_evict(Oid dboid, bool wait);
extern void launcher_admit(Oid dboid);

extern PGDLLEXPORT void statbuffer_launcher_main(Datum main_arg);

#endif							/* STATBUFFER_LAUNCHER_H */
