/*-------------------------------------------------------------------------
 *
 * launch.h
 *	  Starting the launcher, and waiting for what is loaded after a restart.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_LAUNCH_H
#define STATBUFFER_LAUNCH_H

/* for launch_await_load(): a position after those of all keys */
#define LAUNCH_ALL_KEYS		PG_UINT64_MAX

extern void launch_register(void);
extern void launch_ensure(void);
extern bool launch_successor(void);
extern bool launch_await_load(Oid relid, uint64 position);
extern bool launch_await_ledger(Oid relid, bool locked);
extern bool launch_ledger_is_loaded(Oid relid);

#endif							/* STATBUFFER_LAUNCH_H */
