/*-------------------------------------------------------------------------
 *
 * shutdown.h
 *	  Server shutdown: detect it, wait for other processes, save counts.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SHUTDOWN_H
#define STATBUFFER_SHUTDOWN_H

#include "postmaster/bgworker.h"

extern bool shutdown_is_server(void);
extern int	shutdown_count_sessions(Oid dboid);
extern void shutdown_save(void);
extern void shutdown_register_exit(void);
extern void shutdown_expect_launcher(BackgroundWorkerHandle *launcher);

#endif							/* STATBUFFER_SHUTDOWN_H */
