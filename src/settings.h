/*-------------------------------------------------------------------------
 *
 * settings.h
 *	  The settings and the version of the module.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SETTINGS_H
#define STATBUFFER_SETTINGS_H

/* must match statbuffer.control */
#define SETTINGS_VERSION	"1.0"

/* the postmaster has loaded the library, so every process has it */
extern bool statbuffer_preloaded;

extern int	statbuffer_ledger_size;
extern int	statbuffer_max_memory;	/* kilobytes */
extern int	statbuffer_max_shutdown;	/* milliseconds */
extern int	statbuffer_max_workers;

extern void settings_init(void);

#endif							/* STATBUFFER_SETTINGS_H */
