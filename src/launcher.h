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

extern PGDLLEXPORT void statbuffer_launcher_main(Datum main_arg);

#endif							/* STATBUFFER_LAUNCHER_H */
