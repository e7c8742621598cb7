# A handler can do in its session what any function can: take on a role, set
# things, make temporary tables, prepare statements, lock.  Within its batch
# that is its own business.  The next flush finds the session as the first did,
# whether the one before it was stored or failed, and as whoever it ran.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use HandlerTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $node = new_node('main', q{shared_preload_libraries = 'statbuffer'});

# The owner is a superuser, who can change the most; its own settings are
# neither to be lost nor to be overruled.
sql(q{
	CREATE ROLE boss LOGIN SUPERUSER;
	CREATE ROLE mate;
	CREATE ROLE bystander LOGIN;
	GRANT mate TO boss;
	ALTER ROLE boss SET search_path = app, public;
	ALTER ROLE boss SET work_mem = '5MB';
	ALTER ROLE boss IN DATABASE postgres SET statbuffer_test.mine = 'role and database';
	CREATE SCHEMA app AUTHORIZATION boss;
	CREATE SEQUENCE app.seq;
	CREATE TABLE app.calls (n serial, key text, session_role name, running_role name,
		path text, memory text, mine text, pid int DEFAULT pg_backend_pid(), left_over text);

	-- what the handler is to do when it comes to a key
	CREATE TABLE app.deeds (key text, deed text);

});
sql(left_over_function('app'));
sql(q{
	CREATE FUNCTION app.store(keys text[], counters bigint[]) RETURNS void LANGUAGE plpgsql AS $$
	DECLARE
		what text;
	BEGIN
		INSERT INTO app.calls (key, session_role, running_role, path, memory, mine, left_over)
		SELECT keys[1], session_user, current_user, current_setting('search_path'), current_setting('work_mem'),
			current_setting('statbuffer_test.mine'), app.left_over();
		FOR what IN SELECT deed FROM app.deeds d WHERE d.key = keys[1] LOOP
			EXECUTE what;
		END LOOP;
	END
	$$;
	CREATE FOREIGN TABLE app.buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h', backoff '1h');
	ALTER FUNCTION app.store OWNER TO boss;
	ALTER FUNCTION app.left_over OWNER TO boss;
	GRANT ALL ON ALL TABLES IN SCHEMA app TO mate, bystander;
	GRANT ALL ON ALL SEQUENCES IN SCHEMA app TO mate, bystander;
	GRANT ALL ON SCHEMA app TO mate, bystander;
	ALTER FOREIGN TABLE app.buf OWNER TO boss;
});

my $as_usual = 'boss|boss|app, public|5MB|role and database|';

# Flushes keys of one batch each, in this order, and returns what each found.
sub flush_one_by_one
{
	my @found;

	foreach my $key (@_)
	{
		sql(qq{SELECT sb_increment('$key', 1, 'app.buf'); SELECT sb_flush('$key', 'app.buf')});
		# it was stored, or has failed
		$node->poll_query_until('postgres', qq{
			SELECT NOT EXISTS (SELECT FROM sb_keys('app.buf') WHERE key = '$key' AND count + in_flight <> 0 AND failures = 0)})
		  or die "no flush of $key";
		push @found, sql(qq{
			SELECT session_role, running_role, path, memory, mine, left_over FROM app.calls
			WHERE key = '$key' ORDER BY n DESC LIMIT 1});
	}
	return @found;
}

is((flush_one_by_one('first'))[0], $as_usual, 'the first flush: as the owner, with its settings, and nothing else');
my $pid = sql('SELECT DISTINCT pid FROM app.calls');

# Each deed, of a flush that is stored and of one that fails
my %deeds = (
	'SET ROLE' => q{SET ROLE mate},
	'SET SESSION AUTHORIZATION' => q{SET SESSION AUTHORIZATION bystander},
	'both' => q{SET SESSION AUTHORIZATION bystander; SET ROLE bystander},
	'SET search_path' => q{SET search_path = pg_temp, public},
	'set_config' => q{SELECT set_config('work_mem', '77MB', false)},
	'set_config of an own name' => q{SELECT set_config('statbuffer_test.custom', 'x', false),
		set_config('statbuffer_test.mine', 'y', false)},
	'RESET ALL' => q{RESET ALL},
	'CREATE TEMP TABLE' => q{CREATE TEMP TABLE deeds (key text, deed text);
		CREATE TEMP TABLE calls AS SELECT 'mine' AS key},
	'PREPARE' => q{PREPARE p AS SELECT 1},
	'DECLARE CURSOR WITH HOLD' => q{DECLARE c CURSOR WITH HOLD FOR SELECT 1},
	'session lock' => q{SELECT pg_advisory_lock(4714)},
	'all at once' => q{SET ROLE mate; SET search_path = pg_temp; CREATE TEMP TABLE calls (key text);
		SELECT pg_advisory_lock(4715); SET work_mem = '99MB'; PREPARE p AS SELECT 1});

foreach my $name (sort keys %deeds)
{
	my $deed = $deeds{$name};

	sql(qq{TRUNCATE app.deeds;
		INSERT INTO app.deeds VALUES ('does', \$deed\$$deed\$deed\$),
			('fails', \$deed\$$deed; SELECT 1 / 0\$deed\$)});
	# after each comes one that shows what was left
	my @found = flush_one_by_one('does', 'after', 'fails', 'after a failure');
	is($found[1], $as_usual, "$name: nothing is left of it");
	is($found[3], $as_usual, "$name: nor when the flush has failed");
	is(sql(q{SELECT count(*) FROM app.calls WHERE key = 'fails'}), '0', "$name: which it has");
	is(sql(q{SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'}), '0', "$name: no lock is held");
	sql(q{TRUNCATE app.buf});
}

# It is one and the same worker, so it was one and the same session.
is(sql(q{SELECT string_agg(DISTINCT pid::text, ' ') FROM app.calls}), $pid, 'one worker did it all');
is(sql(q{SELECT count(*) FROM pg_class WHERE relpersistence = 't'}), '0', 'no temporary table is left');

# Not even the last of a sequence is there.
sql(q{TRUNCATE app.deeds;
	INSERT INTO app.deeds VALUES ('next', $$SELECT nextval('app.seq')$$), ('current', $$SELECT currval('app.seq')$$)});
flush_one_by_one('next', 'current');
like(sql(q{SELECT last_error FROM sb_keys('app.buf') WHERE key = 'current'}),
	qr/currval of sequence "seq" is not yet defined/, 'sequences are as in a new session');

# LISTEN is refused in a background process by PostgreSQL itself; NOTIFY is not.
sql(q{TRUNCATE app.buf; TRUNCATE app.deeds;
	INSERT INTO app.deeds VALUES ('listen', 'LISTEN x'), ('notify', 'NOTIFY x')});
flush_one_by_one('listen', 'notify');
is(sql(q{SELECT key, last_error FROM sb_keys('app.buf') WHERE failures > 0}),
	'listen|cannot execute LISTEN within a background process', 'LISTEN fails, NOTIFY does not');

# With one key a call, each call begins as the owner, though it is the same
# transaction.  What is set for the transaction holds in it, also at its end.
sql(q{TRUNCATE app.buf; TRUNCATE app.calls; TRUNCATE app.deeds;
	DROP FUNCTION app.store;
	CREATE FUNCTION app.store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO app.calls (key, session_role, running_role, path, memory)
		SELECT $1, session_user, current_user, current_setting('search_path'), current_setting('work_mem');
		SET LOCAL work_mem = '66MB';
		IF key < 'c' THEN
			SET ROLE mate;
		ELSE
			SET SESSION AUTHORIZATION bystander;
		END IF;
	END
	$$;
	ALTER FUNCTION app.store OWNER TO boss;
	CREATE FUNCTION app.at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO app.calls (key, memory) VALUES ('at commit', current_setting('work_mem'));
		RETURN NULL;
	END
	$$;
	CREATE CONSTRAINT TRIGGER late AFTER INSERT ON app.calls DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW WHEN (new.key = 'a') EXECUTE FUNCTION app.at_commit();
	INSERT INTO app.buf VALUES ('a'), ('b'), ('c'), ('d')});
is(sql(q{SELECT sb_drain('app.buf')}), 't', 'one batch of four calls');
is(sql(q{SELECT string_agg(concat_ws(' ', key, session_role, running_role, memory), E'\n' ORDER BY n) FROM app.calls}),
	"a boss boss 5MB\nb boss boss 66MB\nc boss boss 66MB\nd boss boss 66MB\nat commit 66MB",
	'each call runs as the owner, in one transaction');
is(sql(q{SELECT count(DISTINCT xmin::text) FROM app.calls WHERE key <> 'at commit'}), '1', 'in one transaction');
sql(q{INSERT INTO app.buf VALUES ('e')});
is(sql(q{SELECT sb_drain('app.buf')}), 't', 'another batch');
is(sql(q{SELECT concat_ws(' ', key, session_role, running_role, memory) FROM app.calls WHERE key = 'e'}),
	'e boss boss 5MB', 'finds nothing of it');

# Settings that would have a session begin as another role: the worker is the
# owner all the same, and so it is after the handler has reset its role.
sql(q{
	ALTER ROLE boss SET role = 'mate';
	ALTER ROLE boss IN DATABASE postgres SET role = 'mate';
	TRUNCATE app.calls;
	SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker';
	DROP TRIGGER late ON app.calls;
	CREATE OR REPLACE FUNCTION app.store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO app.calls (key, session_role, running_role) SELECT $1, session_user, current_user;
		RESET ROLE;
		INSERT INTO app.calls (key, session_role, running_role) SELECT $1, session_user, current_user;
	END
	$$;
	INSERT INTO app.buf VALUES ('a')});
is( $node->safe_psql('postgres', q{SELECT session_user, current_user}, extra_params => [ '-U', 'boss' ]),
	'boss|mate', "a session of the owner's is another role at once");
sql(q{SELECT sb_drain('app.buf')});
is(sql(q{SELECT string_agg(concat_ws(' ', key, session_role, running_role), E'\n' ORDER BY n) FROM app.calls}),
	"a boss boss\na boss boss", 'but a worker is not');

$node->stop;
done_testing();
