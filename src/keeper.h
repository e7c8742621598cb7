/*-------------------------------------------------------------------------
 *
 * keeper.h
 *	  The process that keeps the ledger of a database.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_KEEPER_H
#define STATBUFFER_KEEPER_H

/*
 * A keeper that has nothing to do within this time leaves, and another one is
 * started when there is.
 */
#define KEEPER_STAY_MSECS	1000

extern PGDLLEXPORT void statbuffer_keeper_main(Datum main_arg);

#endif							/* STATBUFFER_KEEPER_H */
