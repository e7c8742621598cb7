/*-------------------------------------------------------------------------
 *
 * stopping.h
 *	  What is done when the server stops.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_STOPPING_H
#define STATBUFFER_STOPPING_H

#include "postmaster/bgworker.h"

extern bool stopping_server(void);
extern int	stopping_sessions(Oid dboid);
extern void stopping_save(void);
extern void stopping_stand_by(void);
extern void stopping_expect_launcher(BackgroundWorkerHandle *launcher);

#endif							/* STATBUFFER_STOPPING_H */
