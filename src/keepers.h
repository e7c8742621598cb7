/*-------------------------------------------------------------------------
 *
 * keepers.h
 *	  Starting the processes that keep the databases' ledgers.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_KEEPERS_H
#define STATBUFFER_KEEPERS_H

#include "clock.h"

extern void keepers_init(void);
extern ClockTime keepers_start(void);

#endif							/* STATBUFFER_KEEPERS_H */
