# Random calls: several sessions call every function and use buffers in every
# way that SQL has, with arguments that were never meant for them, while
# handlers misbehave, definitions change and processes are cut off.
#
# Whatever the answers are, the server must not crash, no internal error may
# reach a user, nothing may be left behind (memory, keys, locks), and what was
# counted together with a ledger must be stored to the last one.
#
# With STATBUFFER_FUZZ_DDL most of it alters, between two calls of one statement,
# what the statement works with: types, casts, buffers, rights.
#
# STATBUFFER_FUZZ_CALLS says how many calls are sent, STATBUFFER_FUZZ_SECONDS
# sends no more of them after that time, STATBUFFER_FUZZ_SEED sends others, and
# STATBUFFER_FUZZ_UNIT sends the messages of only one unit, and shows them.
# A message that begins or ends a transaction or a savepoint, sets something, or
# makes what is to be called is no call.  With odd seeds the library is preloaded.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin, "$FindBin::RealBin/..";

use FuzzCalls qw(unit steady_unit);
use FuzzLog qw(check_log);
use FuzzModel;
use FuzzSession qw(simple);
use FuzzStatements;
use FuzzUnits;
use FuzzWorld;
use IO::Select;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(time);

my $calls = $ENV{STATBUFFER_FUZZ_CALLS} || sized(8000, 300);
my $seconds = $ENV{STATBUFFER_FUZZ_SECONDS};
my $seed = $ENV{STATBUFFER_FUZZ_SEED} || 1;
my $only = $ENV{STATBUFFER_FUZZ_UNIT};
my $ddl = $FuzzCalls::ddl = $ENV{STATBUFFER_FUZZ_DDL} ? 1 : 0;

note("STATBUFFER_FUZZ_CALLS=$calls STATBUFFER_FUZZ_SEED=$seed");

# Small enough that it fills up now and then
my $memory = '32MB';

my $node = new_node(
	'fuzz',
	'max_connections = 50',
	'max_worker_processes = 24',
	'max_prepared_transactions = 4',
	'statbuffer.max_workers = 8',
	"statbuffer.max_memory = '$memory'",
	'max_locks_per_transaction = 256',
	'autovacuum_naptime = 5s',
	'deadlock_timeout = 100ms',
	'log_statement = none',
	'log_error_verbosity = verbose',
	'log_min_messages = warning',
	'client_min_messages = error',
	'jit = off',
	'fsync = off',
	$seed % 2 ? "shared_preload_libraries = 'statbuffer'" : ());
my $started = $node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()');

# What came with this setting refuses such rows: see doc/security.md.
$misreading = $node->safe_psql('postgres', "SELECT current_setting('composite_type_mismatch', true) IS NULL") eq 't';
note('PostgreSQL ' . $node->safe_psql('postgres', 'SHOW server_version_num')
	  . ' misreads rows that are older than the types of their attributes: no such row is held')
  if $misreading;

# --- the world --------------------------------------------------------------

my %databases = (utf => 'UTF8', latin => 'LATIN1', bytes => 'SQL_ASCII');

# definitions have little to do with encodings
delete $databases{latin} if $ddl;

sub admin
{
	my ($database) = @_;

	# no event triggers
	return FuzzSession->new($node, $database, application_name => 'admin',
		options => '-c session_replication_role=replica');
}

$node->safe_psql('postgres', roles());
foreach my $database (sort keys %databases)
{
	$node->safe_psql('postgres', "CREATE DATABASE $database ENCODING '$databases{$database}' LOCALE 'C' TEMPLATE template0");
	$node->safe_psql($database, 'CREATE EXTENSION statbuffer');

	my ($before, $after) = surroundings();

	$node->safe_psql($database, join(";\n", 'SET check_function_bodies = off', $before, definitions(), $after, $ddl ? ddl_surroundings() : ()));
}

# How many large keys there is room for, by whole hundreds, in a buffer made for
# it whose keys cannot be flushed
sub room
{
	my ($admin) = @_;
	my $keys = 0;

	$admin->query(q{CREATE FOREIGN TABLE s_room (key text, n bigint DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'no_such', interval '1d', timeout '0')});
	until ($admin->attempt("INSERT INTO s_room SELECT rpad('key ' || g, 1000), 1"
			  . " FROM generate_series($keys + 1, $keys + 100) AS g"))
	{
		$keys += 100;
		die 'memory has no bound' if $keys > 1_000_000;
	}
	$admin->query('DROP FOREIGN TABLE s_room');
	return $keys;
}

my $admin = admin('utf');
my $room = $only ? 0 : room($admin);
note("room for $room keys");

# --- the load ---------------------------------------------------------------

my $until = defined $seconds ? time + $seconds : undef;
my $number = $only // 0;
my $sent = 0;
my $messages = 0;
my %errors;
my $lost = 0;
my $hung;
my $compared = 0;
my @surprises;

my $no_call = qr{^(?:BEGIN|COMMIT|ROLLBACK|SAVEPOINT|RELEASE|PREPARE\ TRANSACTION|SET|DEALLOCATE|CLOSE)\b
	|^SELECT\ d_(?:re)?make\(\)$}x;

# Takes its messages from one unit after the other.
sub next_message
{
	my ($client) = @_;
	my $session = $client->{session};
	my $recover = $session->{status} eq 'E' ? delete $session->{message}{on_error} : undef;

	# what a model expects only holds while nothing unexpected has happened
	if (defined $session->{error})
	{
		$client->{astray} = 1 unless $session->{message}{may_fail};
	}
	elsif (defined $session->{message}{expect})
	{
		my $expected = delete $session->{message}{expect};
		my $got = $session->{rows}[0][0] // 'null';

		$compared++ if !$client->{astray};
		push @surprises, "unit $client->{unit}: $session->{message}{text}: expected '$expected', got '$got'"
		  if !$client->{astray} && $got ne $expected;
	}

	return { %{ simple($recover) }, plain => 1 } if $recover;
	return if $client->{done};
	while (!@{ $client->{messages} })
	{
		if ($client->{cleaning})
		{
			$client->{cleaning} = 0;
			$client->{done} = $hung || $sent >= $calls || defined $until && time > $until || defined $only && $number > $only;
			return if $client->{done};
			$client->{unit} = $number;
			$client->{astray} = 0;
			$FuzzModel::client = $client->{number};
			%FuzzUnits::function_oid = %{ $client->{oids} };
			$client->{messages} = [ unit($seed, $number++) ];
			note("unit $client->{unit}: $_->{text}") foreach defined $only ? @{ $client->{messages} } : ();
			next;
		}

		# a transaction that a unit has left, and what it has set
		$client->{cleaning} = 1;
		$client->{messages} = [
			map { +{ %{ simple($_) }, plain => 1 } }
			  ($session->in_transaction ? ('ROLLBACK') : ()),
			'RESET SESSION AUTHORIZATION', 'RESET ALL', 'DEALLOCATE ALL', 'DROP TABLE IF EXISTS t_made, t_void'
		];
	}
	return shift @{ $client->{messages} };
}

sub connect_client
{
	my ($client) = @_;

	# a client waits neither for a lock nor for a flush that cannot come
	$client->{session} = FuzzSession->new($node, $client->{database}, application_name => 'fuzz',
		options => '-c statement_timeout=1s -c lock_timeout=300ms');
	$client->{session}{errors} = \%errors;
	$client->{astray} = 1;
	return if $client->{oids};

	# by one who has the time
	my $admin = admin($client->{database});
	$client->{oids} = { map { @$_ } $admin->query(q{
		SELECT format('%s(%s)', proname,
			array_to_string(ARRAY(SELECT format_type(t, NULL) FROM unnest(proargtypes) t), ',')), oid
		FROM pg_proc WHERE probin LIKE '%statbuffer%'}) };
	$admin->close;
}

# A database that comes and goes, with counts in it
sub brief_database
{
	my $error = $admin->attempt('CREATE DATABASE brief TEMPLATE template0');

	if (!$error)
	{
		my $session = FuzzSession->new($node, 'brief');

		foreach ('CREATE EXTENSION statbuffer',
			"CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(0.01)'",
			'SELECT sb_start()',
			q{SELECT sb_increment('k' || g) FROM generate_series(1, 100) AS g})
		{
			my $full = $session->attempt($_);

			# memory may be out just then, for each of them
			die "$full in: $_" if defined $full && $full !~ /^53200:/;
		}
		$session->close;
	}
	$admin->attempt($_) foreach
	  'SET statement_timeout = 10000',
	  'CREATE DATABASE copy TEMPLATE brief',
	  'ALTER DATABASE copy RENAME TO briefer',
	  'DROP DATABASE IF EXISTS briefer',
	  'DROP DATABASE IF EXISTS brief',
	  'SET statement_timeout = 0';
}

# What happens to processes, and to the bound of the memory
sub strike
{
	my $what = int rand 12;

	return brief_database() if rand(40) < 1;

	my $whom = $what < 4 ? "backend_type = 'statbuffer worker'"
	  : $what < 10 ? "application_name = 'fuzz'"
	  : "backend_type = 'statbuffer launcher' AND random() < 0.2";

	if ($what < 11)
	{
		my $how = rand(2) < 1 ? 'pg_terminate_backend' : 'pg_cancel_backend';

		$admin->query("SELECT $how(pid) FROM (SELECT pid FROM pg_stat_activity WHERE $whom ORDER BY random() LIMIT 1) p");
	}
	else
	{
		$admin->query('ALTER SYSTEM SET statbuffer.max_memory = ' . (rand(3) < 1 ? "'4MB'" : "'$memory'"));
		$admin->query('SELECT pg_reload_conf()');
	}
	$admin->query("ROLLBACK PREPARED '$_->[0]'")
	  foreach $admin->query("SELECT gid FROM pg_prepared_xacts"
		  . " WHERE prepared < now() - interval '2 seconds' AND database = current_database()");
}

my $clients = 0;
my @clients = map { +{ number => ++$clients, database => $databases{$_} ? $_ : 'bytes', messages => [], cleaning => 0 } }
  qw(utf utf utf latin latin bytes);
my $alive = eval {
	my $next_strike = 100;

	connect_client($_) foreach @clients;
	for (;;)
	{
		my $busy = 0;

		foreach my $client (@clients)
		{
			my $session = $client->{session};

			if ($session->is_idle && (my $message = next_message($client)))
			{
				$session->send($message);
				$messages++ unless $message->{plain};
				$sent++ unless $message->{plain} || $message->{text} =~ $no_call;
			}
			$busy++ if !$session->is_idle;
			$hung //= "unit $client->{unit}: $session->{message}{text}"
			  if !$session->is_idle && time > $session->{since} + $PostgreSQL::Test::Utils::timeout_default;
		}
		last if $busy == 0 || $hung;

		my %client = map { fileno($_->{session}{socket}) => $_ } grep { !$_->{session}->is_idle } @clients;
		foreach my $socket (IO::Select->new(keys %client)->can_read(0.1))
		{
			my $client = $client{$socket};

			next if $client->{session}->receive;
			$lost++;
			connect_client($client);
		}
		if ($sent >= $next_strike && !defined $only)
		{
			strike();
			$next_strike = $sent + 100;
		}
	}
	1;
};
diag($@) if !$alive;
ok($alive, 'the server answers to the end');
is($hung, undef, 'each call comes back');
is(scalar(@surprises), 0, 'sessions see what they should');
diag($_) foreach grep { defined } @surprises[ 0 .. 9 ];
note("$sent calls and " . ($messages - $sent) . " other messages in $number units, $lost connections lost, $compared times compared with the model");
note('errors: ' . join(', ', map { "$_ $errors{$_}" } sort { $errors{$b} <=> $errors{$a} } keys %errors));

if (!$alive || $hung || defined $only)
{
	check_log($node, $ddl);
	done_testing();
	exit;
}

# --- the reckoning ----------------------------------------------------------

my %admin = map { $_ => $_ eq 'utf' ? $admin : admin($_) } keys %databases;

$_->{session}->close foreach @clients;
$admin->query('ALTER SYSTEM RESET statbuffer.max_memory');
$admin->query('SELECT pg_reload_conf()');
foreach my $database (sort keys %databases)
{
	my $session = $admin{$database};

	$session->query("ROLLBACK PREPARED '$_->[0]'")
	  foreach $session->query('SELECT gid FROM pg_prepared_xacts WHERE database = current_database()');
	$session->query('UPDATE mood SET failing = 0, rude = false');
	$session->query('DROP EVENT TRIGGER definitions');
	my @undrained;

	foreach my $buffer (map { $_->[0] } $session->query(q{
		SELECT ftrelid::regclass FROM pg_foreign_table WHERE ftrelid::regclass::text ~ '^(control|b_)' ORDER BY 1}))
	{
		$session->query("SELECT sb_start('$buffer')");
		push @undrained, $buffer if $session->value("SELECT sb_drain('$buffer', '$patience')") ne 't';
	}
	is("@undrained", '', "$database: buffers can be drained");

	# to the last one
	is( join(', ', map { join ' ', map { $_ // 'null' } @$_ } $session->query(q{
		SELECT key, l.n AS ledger, s.n AS stored
		FROM (SELECT key, sum(n) AS n FROM ledger GROUP BY key) l
		FULL JOIN (SELECT key, sum(n) AS n FROM stored WHERE key <> 'async' GROUP BY key) s USING (key)
		WHERE coalesce(l.n, 0) <> coalesce(s.n, 0) ORDER BY key LIMIT 20})),
		'',
		"$database: what the ledger has is stored");
	is($session->value('SELECT count(*) FROM control'), 0, "$database: and nothing else is held");
	my ($begun, $async, $ended) = @{ ($session->query(q{
		SELECT CASE WHEN b.is_called THEN b.last_value ELSE 0 END,
			(SELECT coalesce(sum(n), 0) FROM stored WHERE key = 'async'),
			CASE WHEN e.is_called THEN e.last_value ELSE 0 END
		FROM begun b, ended e}))[0] };
	ok($ended <= $async && $async <= $begun,
		"$database: asynchronous increments: $ended ended, $async stored, $begun begun");

	# What is still held is discarded, and then nothing is.  A buffer that was
	# altered into another shape can only be dropped, and one that is stopped or
	# whose owner cannot log in has no worker to clean up.
	foreach my $buffer (map { $_->[0] } $session->query(q{
		SELECT ftrelid::regclass FROM pg_foreign_table t JOIN pg_foreign_server s ON s.oid = ftserver
		WHERE srvname = 'statbuffer' AND NOT pg_is_other_temp_schema((SELECT relnamespace FROM pg_class WHERE oid = ftrelid))}))
	{
		my $error = $session->attempt("ALTER FOREIGN TABLE $buffer OPTIONS (ADD timeout '100ms')");

		$error = $session->attempt("ALTER FOREIGN TABLE $buffer OPTIONS (SET timeout '100ms')") if $error;
		$session->attempt("ALTER FOREIGN TABLE $buffer OPTIONS (DROP stopped)");
		$error ||= $session->attempt("TRUNCATE $buffer");
		$error ||= $session->attempt("ALTER FOREIGN TABLE $buffer OWNER TO SESSION_USER");
		$session->query("DROP FOREIGN TABLE $buffer CASCADE") if $error;
	}
	wait_for($node, $database, q{
		SELECT count(*) = 0 FROM sb_stat_buffers WHERE keys <> 0 OR pending <> 0 OR in_flight <> 0},
		"$database: no buffer holds anything");
	diag(join ' ', map { $_ // 'null' } @$_) foreach $session->query(q{
		SELECT buffer, owner, state, keys, pending, in_flight, last_error
		FROM sb_stat_buffers WHERE keys <> 0 OR pending <> 0 OR in_flight <> 0});

	# in the database's encoding, however long they were
	is($session->attempt('SELECT length(last_error), upper(last_error) FROM sb_stat_buffers'),
		undef, "$database: errors can be read");
}

# Whatever was locked by calls is not any more.
wait_for($node, 'postgres', q{
	SELECT count(*) = 0 FROM pg_locks
	WHERE pid IS DISTINCT FROM pg_backend_pid() AND locktype IN ('relation', 'advisory', 'object')
	AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = pg_locks.pid AND backend_type LIKE '%autovacuum%')},
	'no locks are left');

# --- memory -----------------------------------------------------------------

# How the memory contexts of a process grow, when it does the same for several
# times after it has done so for as many: what is to be cached is cached then.
# Except that PostgreSQL's own cache of the catalogs also remembers what is not
# there any more.
sub growth
{
	my ($sizes, $work, $limit, $what) = @_;

	$work->() foreach 1 .. 5;
	my %before = $sizes->();
	$work->() foreach 1 .. 5;
	my %after = $sizes->();
	my $growth = 0;

	foreach my $name (sort keys %after)
	{
		my $grown = $after{$name} - ($before{$name} // 0);

		note("$what: context $name grew by $grown to $after{$name} bytes") if $grown > 0;
		$growth += $grown if $name ne 'CacheMemoryContext';
	}
	cmp_ok($growth, '<', $limit, "memory of $what grows by $growth bytes in five rounds");
}

my $session = FuzzSession->new($node, 'utf');
my $session_sizes = sub {
	return map { @$_ } $session->query('SELECT name, sum(used_bytes) FROM pg_backend_memory_contexts GROUP BY name');
};

# random calls that alter nothing
my @messages = map { steady_unit($seed, $_) } 1 .. 40;

growth(
	$session_sizes,
	sub {
		foreach my $message (@messages)
		{
			$session->send($message);
			$session->wait or die "connection lost in: $message->{text}";
		}
		$session->query('ROLLBACK') if $session->in_transaction;
	},
	20_000,
	'a session that calls');

# Buffers that come and go, some with their transaction: five hundred of them.
# What is kept of those that are gone may be as many as are there.
growth(
	$session_sizes,
	sub {
		foreach my $i (1 .. 100)
		{
			$session->query($_) foreach
			  'BEGIN',
			  "CREATE FOREIGN TABLE s_new (key text, n bigint) SERVER statbuffer OPTIONS (handler 'take')",
			  "INSERT INTO s_new VALUES ('x', 1)",
			  ($i % 2 ? 'ROLLBACK' : ('COMMIT', 'DROP FOREIGN TABLE s_new'));
		}
	},
	200_000,
	'a session that makes buffers');

# the worker of a buffer, with a handler that fails now and then
sub worker_sizes
{
	$node->poll_query_until('utf', "SELECT pid IS NOT NULL FROM sb_stat_buffers WHERE buffer = 'control'")
	  or die 'there is no worker';
	my $pid = $session->value("SELECT pid FROM sb_stat_buffers WHERE buffer = 'control'");
	my $log = $node->logfile;
	my $offset = -s $log;

	$session->query("SELECT pg_log_backend_memory_contexts($pid)");
	$node->wait_for_log(qr/\[$pid\] .*Grand total: \d+ bytes/, $offset);
	my $text = slurp_file($log, $offset);
	my %sizes;

	$sizes{$2} = ($sizes{$2} // 0) + $3
	  while $text =~ /\[$pid\] .*level: (\d+); (.*?): .* (\d+) used$/mg;
	die 'a worker does not tell of its memory' if !%sizes;
	return %sizes;
}

$session->query("ALTER FOREIGN TABLE control OPTIONS (SET timeout '1h')");
$session->query('UPDATE mood SET failing = 0.2');
growth(
	\&worker_sizes,
	sub {
		foreach (1 .. 20)
		{
			$session->query('INSERT INTO control SELECT g, 1 FROM generate_series(1, 50) g');
			$session->query("SELECT sb_drain('control', '$patience')");
		}
	},
	20_000,
	'a worker');
$session->close;

# Shared memory: when all buffers are gone there is as much room as at first.
# Nobody tells when the last of them is, so it is tried again.
$_->close foreach map { $admin{$_} } grep { $_ ne 'utf' } keys %databases;
$admin->query("DROP DATABASE $_") foreach grep { $_ ne 'utf' } keys %databases;
$admin->query('DROP EXTENSION statbuffer CASCADE');
$admin->query('CREATE EXTENSION statbuffer');

my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;
my $room_now = 0;
$room_now = room($admin) while $room_now < 0.95 * $room && time < $deadline;
cmp_ok($room_now, '>=', 0.95 * $room, 'there is as much room for keys as at first');

is($node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()'), $started, 'the server has never restarted');
$node->stop('fast');
check_log($node, $ddl);

done_testing();
