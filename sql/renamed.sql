--
-- renamed: nothing goes by the names of the wrapper and the server
--
SET statement_timeout = '2min';

CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS '';
CREATE FOREIGN TABLE before (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
SELECT sb_increment('k', 1, 'before');

-- An ordinary wrapper of that name has no buffers.
ALTER FOREIGN DATA WRAPPER statbuffer RENAME TO "Renamed wrapper";
ALTER SERVER statbuffer RENAME TO "Renamed server";
CREATE FOREIGN DATA WRAPPER statbuffer;
CREATE SERVER statbuffer FOREIGN DATA WRAPPER statbuffer;
CREATE FOREIGN TABLE foreign_one (key text NOT NULL, count bigint NOT NULL DEFAULT 1) SERVER statbuffer;
-- One with the same handler has.
CREATE FOREIGN DATA WRAPPER another HANDLER statbuffer_fdw_handler VALIDATOR statbuffer_fdw_validator;
CREATE SERVER another FOREIGN DATA WRAPPER another;
CREATE FOREIGN TABLE another_one (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER another OPTIONS (interval '1h');
SELECT sb_increment('k', 2, 'another_one');
SELECT buffer, pending FROM sb_stat_buffers ORDER BY buffer;
SELECT sb_increment('k', 1, 'foreign_one');

-- The default buffer is made of the server that came with the extension.
SELECT sb_start();
SELECT srvname FROM pg_foreign_table JOIN pg_foreign_server s ON s.oid = ftserver
  WHERE ftrelid = 'sb_default'::regclass;
SELECT sb_increment('k');
SELECT sb_stop();
SELECT sb_start();
SELECT sb_drain();
SELECT buffer, flushed_keys FROM sb_stat_buffers WHERE flushed_keys > 0;

SELECT pg_get_viewdef('sb_stat_buffers'::regclass) ~ 'statbuffer_fdw_handler\(\)''::regprocedure' AS by_handler;

DROP FOREIGN TABLE before, another_one, foreign_one, sb_default;
DROP FOREIGN DATA WRAPPER statbuffer CASCADE;
DROP FOREIGN DATA WRAPPER another CASCADE;
ALTER SERVER "Renamed server" RENAME TO statbuffer;
ALTER FOREIGN DATA WRAPPER "Renamed wrapper" RENAME TO statbuffer;
DROP FUNCTION handle_flush(text, bigint);
