-- What the buffers of this database do, for a screen of 120 columns:
--   psql -f doc/monitoring/watch.sql
-- or \i in a session.  It looks again every two seconds, until it is cancelled.
--
-- due_in  seconds until the next key is due; negative when that is late
-- per_s   increments a second since the last look; at the first look, since
--         the statistics were reset.  The session remembers the last look.
-- failures  how many attempts have failed and, while the buffer fails, why the
--           last one did: the beginning of last_error

WITH before AS MATERIALIZED (
  SELECT *
  FROM json_to_recordset(coalesce(nullif(current_setting('statbuffer_watch.seen', true), ''), '[]')::json)
    AS b (relid oid, increments bigint, at timestamptz)
), now AS MATERIALIZED (
  SELECT *, clock_timestamp() AS at FROM sb_stat_buffers
), remember AS MATERIALIZED (
  -- counts what was seen before, so that it is read before it is replaced
  SELECT (SELECT count(*) FROM before),
    set_config('statbuffer_watch.seen', coalesce(json_agg(json_build_object(
      'relid', relid, 'increments', increments, 'at', at)), '[]')::text, false)
  FROM now
)
SELECT left(now.relid::regclass::text, 16) AS buffer, state, keys, pg_size_pretty(memory) AS memory,
  pending + in_flight AS count,
  round(extract(epoch FROM oldest_due - now.at), 1) AS due_in,
  round((now.increments - coalesce(before.increments, 0)) /
    nullif(extract(epoch FROM now.at - coalesce(before.at, stats_reset)), 0)) AS per_s,
  regexp_replace(left(concat(failures, CASE WHEN state = 'failing'
    THEN ': ' || regexp_replace(last_error, '\s+', ' ', 'g') END), 100), '(.{20})(?=.)', E'\\1\n', 'g') AS failures
FROM remember CROSS JOIN now
  LEFT JOIN before ON before.relid = now.relid AND before.increments <= now.increments
ORDER BY state = 'failing' DESC, now.relid::regclass::text
\watch 2
