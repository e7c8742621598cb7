# What depends on the version of PostgreSQL, as it is documented: what the
# processes are said to wait for, owners that may not log in, where the shared
# memory is, and what the server knows of the library.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('versions');
my $version = major($node);

note "PostgreSQL $version";

# --- wait events ------------------------------------------------------------

# Wait events have names of our own since 17.
sub waits_for
{
	my ($where, $name, $what) = @_;
	my $event = $version >= 17 ? $name : 'Extension';

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $db, qq{
			SELECT wait_event_type = 'Extension' AND wait_event = '$event'
			FROM pg_stat_activity WHERE $where}, "$what waits for $event");
}

# A buffer that has been flushed, and holds a key that is not due for long.
make_buffer($node, $db, 'quiet', q{interval '1h', timeout '1h'});
increment($node, $db, 'quiet', 'k', 1);
is(sql(q{SELECT sb_drain('quiet')}), 't', 'the processes are there');
increment($node, $db, 'quiet', 'k', 1);
waits_for(q{backend_type = 'statbuffer launcher'}, 'StatbufferLauncherMain', 'the launcher');
waits_for(q{backend_type = 'statbuffer worker'}, 'StatbufferWorkerMain', 'a worker with nothing due');

# A session drains a buffer, whose handler waits.
my $gate = close_gate($node, $db);
my $drain = $node->background_psql($db);
$drain->query_until(qr/drains/, "\\echo drains\nSELECT sb_drain('quiet');\n");
waits_for(q{query LIKE 'SELECT sb_drain%'}, 'StatbufferDrain', 'a session that drains');
open_gate($gate);
wait_for_stored($node, $db, 'quiet', 2, 'it has been drained');
$drain->quit;

# A database is to be renamed, and the handler of its worker takes its time.
# For some seconds the session that renames it waits for that worker to leave.
sql('CREATE DATABASE other');
$node->safe_psql('other', 'CREATE EXTENSION statbuffer');
make_buffer($node, 'other', 'slow', q{interval '0'});
$gate = close_gate($node, 'other');
increment($node, 'other', 'slow', 'k', 1);
wait_for($node, 'other', q{SELECT in_flight = 1 FROM sb_stat_buffers}, 'a handler is at work in the other database');
my $rename = $node->background_psql($db, on_error_stop => 0);
$rename->query_until(qr/renames/, "\\echo renames\nLOAD 'statbuffer';\nALTER DATABASE other RENAME TO another;\n");
waits_for(q{query LIKE 'ALTER DATABASE%'}, 'StatbufferEviction', 'a session that renames a database');
open_gate($gate);
$rename->quit;

# What has been waited for is listed.  (The first session to count may have
# waited for the launcher, or not.)
SKIP:
{
	skip 'no list of wait events before version 17', 1 if $version < 17;

	is(sql(q{SELECT string_agg(name, ' ' ORDER BY name) FROM pg_wait_events
			WHERE type = 'Extension' AND name LIKE 'Statbuffer%' AND name <> 'StatbufferLauncherStart'}),
		'StatbufferDrain StatbufferEviction StatbufferLauncherMain StatbufferWorkerMain',
		'pg_wait_events lists them');
}

# --- owners that may not log in ---------------------------------------------

sql(q{CREATE ROLE closed NOLOGIN});
make_buffer($node, $db, 'likes', q{interval '0', backoff '100ms', timeout '1h'});
sql(q{
	ALTER TABLE likes_calls ADD who text DEFAULT session_user || ' ' || current_user;
	ALTER TABLE likes_calls OWNER TO closed;
	ALTER TABLE likes_bad OWNER TO closed;
	ALTER FUNCTION likes_store OWNER TO closed;
	ALTER FOREIGN TABLE likes OWNER TO closed});

if ($version >= 17)
{
	# The worker connects as the owner all the same.
	sql(q{SELECT sb_start('likes')});
	increment($node, $db, 'likes', 'k', 3);
	wait_for_stored($node, $db, 'likes', 3, 'what an owner without LOGIN has counted is stored');
	is(sql(q{SELECT usename FROM sb_stat_buffers JOIN pg_stat_activity USING (pid)
			WHERE buffer = 'likes'}),
		'closed', 'the worker is connected as that role');
}
else
{
	# sb_start() says that it cannot, increments are kept until it can.
	my ($status, $out, $err) = $node->psql($db, q{SELECT sb_start('likes')});
	like($err, qr/role "closed" is not permitted to log in.*HINT:  Grant the role the LOGIN privilege/s,
		'sb_start() refuses an owner without LOGIN');
	increment($node, $db, 'likes', 'k', 3);
	wait_for($node, $db, q{
			SELECT state = 'failing' AND pending = 3 AND last_error LIKE '%does not have the LOGIN privilege%'
			FROM sb_stat_buffers WHERE buffer = 'likes'},
		'what is counted all the same is kept, and the view tells why');
	sql('ALTER ROLE closed LOGIN');
	wait_for_stored($node, $db, 'likes', 3, 'it is stored when the role may log in');
}
is(sql('SELECT DISTINCT who FROM likes_calls'), 'closed closed', 'the handler runs as that role');

# The role loses LOGIN while its worker is there, and while none is.
sql(q{ALTER ROLE closed LOGIN});
increment($node, $db, 'likes', 'k', 4);
wait_for_stored($node, $db, 'likes', 7, 'the role may log in');
sql(q{ALTER ROLE closed NOLOGIN});
increment($node, $db, 'likes', 'k', 5);
if ($version < 17)
{
	wait_for($node, $db, q{
			SELECT pending = 5 AND pid IS NULL AND last_error LIKE '%does not have the LOGIN privilege%'
			FROM sb_stat_buffers WHERE buffer = 'likes'},
		'the worker leaves, and the next one can not connect');
	sql(q{ALTER ROLE closed LOGIN});
}
wait_for_stored($node, $db, 'likes', 12, 'one stores what was counted meanwhile when it may');

# --- the library ------------------------------------------------------------

# Not preloaded, it took shared memory where it could.
is(sql(q{SELECT count(*) FROM pg_shmem_allocations WHERE name = 'statbuffer'}),
	$version >= 17 ? 0 : 1,
	'the main shared memory segment is lived off before version 17 only');

# Neither does it reserve room there when it is preloaded; and all is found.
$node->append_conf('postgresql.conf', q{shared_preload_libraries = 'statbuffer'});
$node->restart;
increment($node, $db, 'quiet', 'k', 10);
is(sql(q{SELECT sb_drain('quiet')}), 't', 'preloaded, there is shared memory, too');
is(sql(q{SELECT count(*) FROM pg_shmem_allocations WHERE name = 'statbuffer'}),
	$version >= 17 ? 0 : 1,
	'in the same place');

SKIP:
{
	skip 'libraries have no version before 18', 1 if $version < 18;

	is(sql(q{
			SELECT module_name, version = extversion, file_name
			FROM pg_get_loaded_modules(), pg_extension
			WHERE module_name = 'statbuffer' AND extname = 'statbuffer'}),
		'statbuffer|t|statbuffer.so', 'the server knows the library and its version');
}

$node->stop;
done_testing();
